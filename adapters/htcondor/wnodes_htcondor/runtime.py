"""What HTCondor calls as its container runtime: ours for VM jobs, the site's own for all others."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from wnodes_htcondor import native

NO_RUNTIME = 255  # apptainer's own code for "could not"


def main(run_dir: str, chirp: str, site_runtime: str = "") -> NoReturn:
    """Answer one call. ``chirp`` and ``site_runtime`` are paths of condor_chirp and of a real apptainer, or ''."""
    call = native.runtime_call(sys.argv[1:])
    if not call.image.startswith(native.PREFIX):
        _hand_on(call, site_runtime)
    if call.verb == "test":
        from wnodes_core.hookmain import main as hook

        hook("htcondor", "prepare", run_dir)
    os.environ["WNODES_CHIRP"] = chirp
    from wnodes_core.launcher import main as launch

    launch("htcondor", run_dir)


def _hand_on(call: native.RuntimeCall, site_runtime: str) -> NoReturn:
    """Become the site's runtime; without one, say so."""
    if site_runtime:
        os.execv(site_runtime, [site_runtime, *sys.argv[1:]])
    if any(name == "--version" for name, _ in call.options):
        from wnodes_core import __version__

        print(f"wnodes runtime {__version__}")
        sys.exit(0)
    image = call.image[:80]
    print(f"wnodes: image {image!r}: this node has no apptainer: want vm_image = NAME", file=sys.stderr)
    sys.exit(NO_RUNTIME)
