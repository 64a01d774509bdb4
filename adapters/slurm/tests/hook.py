"""Stands in for hookmain behind the real Prolog script: the adapter's own read and reply, no wnodesd.

The image's name chooses the outcome: ``hold``, ``requeue``, ``drain``, ``bug``, ``nomarker``; else a marker is written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from wnodes_slurm import plugin

from wnodes_core import command
from wnodes_core.api import NativeCall, Phase, errors

OUTCOMES = {
    "hold": errors.UnknownImage("image 'hold': no such image", hint="one of 'debian12', \"el9\""),
    "requeue": errors.HostBusy("no room for the VM now"),
    "drain": errors.StateDirFull("/var/lib/wnodes: no space left"),
}


def main() -> int:
    """As hookmain would."""
    folder = Path(sys.argv[1])
    phase = Phase.PREPARE if "prepare" in sys.argv[2] else Phase.FINISH if "finish" in sys.argv[2] else Phase.ADVERTISE
    call = NativeCall(phase, environ=dict(os.environ))
    key = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURMD_NODENAME')}"
    (folder / f"{phase}.{key}").write_text(json.dumps(dict(os.environ)))
    marker = folder / "run" / "slurm" / key
    error: errors.WnodesError | None = None
    try:
        request, job = plugin.wnodes_lrms_read(call)
        error = OUTCOMES.get(request.image)
        if request.image == "bug":
            raise RuntimeError("a bug of ours")
    except errors.WnodesError as refused:
        error, job, request = refused, None, None
    reply = plugin.wnodes_lrms_reply(call, error, job)
    for argv in reply.commands:
        command.run(argv, environ=command.clean_environment(("SLURM_CONF",)), check=False)
    if phase is Phase.FINISH:
        marker.unlink(missing_ok=True)
    elif phase is Phase.PREPARE and error is None and request and request.image != "nomarker":
        marker.touch()
    return reply.exit_code


if __name__ == "__main__":
    sys.exit(main())
