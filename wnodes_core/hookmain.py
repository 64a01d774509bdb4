"""Entry point of every hook script: settle in, call dispatch, and never harm the host.

Runs as root or as the user, in an environment the user may have written: everything that
matters is set here, before another module is imported.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main(lrms: str, phase: str) -> NoReturn:
    """Answer one hook call of the LRMS and exit as it expects."""
    os.umask(0o077)
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    try:
        from wnodes_core.dispatch import dispatch

        code = dispatch(lrms, phase, tuple(sys.argv), dict(os.environ))
    except BaseException:  # noqa: BLE001 - the outermost net of a root hook: log, keep the host
        import syslog
        import traceback

        syslog.syslog(syslog.LOG_ERR, f"wnodes {lrms} {phase}: {traceback.format_exc()[-3000:]}")
        # Slurm drains a node whose Prolog or Epilog fails. The job itself still cannot run on the
        # host: without our marker the SPANK plug-in refuses its tasks.
        code = 0
    sys.stdout.flush()
    os._exit(code)
