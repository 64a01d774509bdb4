"""One hook call, from the LRMS's words to wnodesd and back: read, ask, reply."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from wnodes_core.agent.client import call as ask
from wnodes_core.command import clean_environment, run
from wnodes_core.errors import CommandError, WnodesError
from wnodes_core.model import Job, NativeCall, NativeReply, VmRequest
from wnodes_core.phases import Phase
from wnodes_core.plugins import Plugins

# Below every LRMS's patience: Slurm's MessageTimeout is 10 s by default.
HOOK_TIMEOUT_S = 8.0
COMMAND_TIMEOUT_S = 5.0
LRMS_ENVIRONMENT = ("SLURM_CONF", "LSF_ENVDIR", "CONDOR_CONFIG")


def dispatch(
    lrms: str, phase: str, argv: tuple[str, ...], environ: dict[str, str], socket: str, wait: bool = True
) -> int:
    """Answer one hook call; returns the exit code for the LRMS."""
    hook = Plugins(lrms=lrms, builtins=(), scan=False).hook
    native = NativeCall(Phase(phase), argv, environ)
    error, job = None, None
    try:
        found = hook.wnodes_lrms_read(call=native)
        if found is None:
            return 0
        request, job = found
        _ask_daemon(socket, lrms, native.phase, request, job, wait)
    except WnodesError as caught:
        error = caught
    return _carry_out(hook.wnodes_lrms_reply(call=native, error=error, job=job))


def _ask_daemon(socket: str, lrms: str, phase: Phase, request: VmRequest, job: Job | None, wait: bool) -> None:
    question: dict[str, Any] = {"op": phase.value, "lrms": lrms}
    if phase is Phase.PREPARE and job is not None:
        question |= {"request": request.to_dict(), "job": job.to_dict()}
    elif phase is Phase.FINISH and job is not None:
        question |= {"job_id": job.job_id, "node": job.node}
    elif phase in (Phase.PREPARE, Phase.FINISH):  # the LRMS runs this as the job's user: wnodesd sees whose it is
        question |= {"request": request.text(), "wait": wait}
    elif phase is Phase.ADVERTISE:
        question = {"op": "status"}
    else:
        return
    ask(question, timeout_s=HOOK_TIMEOUT_S, path=socket)


def _append(path: str, text: str) -> None:
    """Add to a file of the LRMS's; what the caller's own user may write, and nothing as root."""
    if os.geteuid() == 0:
        raise WnodesError(f"{path}: a hook writes no file as root")
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _carry_out(reply: NativeReply) -> int:
    for path, text in reply.files:
        _append(path, text)
    sys.stdout.write(reply.stdout)
    sys.stderr.write(reply.stderr)
    environ = clean_environment(keep=LRMS_ENVIRONMENT)
    for argv in reply.commands:
        with contextlib.suppress(CommandError):  # they only tell people; nothing depends on them
            run(argv, timeout_s=COMMAND_TIMEOUT_S, environ=environ)
    return reply.exit_code
