"""Entry point of every hook script: settle in, call dispatch, and never harm the host.

Runs as root or as the user, in an environment the user may have written: everything that
matters is set here, before another module is imported.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

BUG = 70  # sysexits.h: EX_SOFTWARE; each hook script knows what its LRMS must hear instead


def main(lrms: str, phase: str, run_dir: str = "/run/wnodes", wait: bool = True) -> NoReturn:
    """Answer one hook call of the LRMS and exit as it expects, or with 70 for a bug of ours.

    ``run_dir`` is where wnodesd has its socket. Without ``wait`` only the message counts, not its outcome.
    """
    os.umask(0o077)
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        from wnodes_core.dispatch import dispatch

        code = dispatch(lrms, phase, tuple(sys.argv), dict(os.environ), f"{run_dir}/wnodesd.sock", wait)
    except BaseException:  # noqa: BLE001 - the outermost net of a root hook: log, keep the host
        import syslog
        import traceback

        syslog.syslog(syslog.LOG_ERR, f"wnodes {lrms} {phase}: {traceback.format_exc()[-3000:]}")
        code = BUG
    sys.stdout.flush()
    os._exit(code)
