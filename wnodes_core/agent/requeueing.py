"""A lease that came to nothing through no fault of the job: have the LRMS run the job again, once.

Only before any of the user's own code ran: a job that has begun must not run twice. Only REQUEUE is
acted on here: a keeper is a user's process, and its word may never drain a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wnodes_core import command
from wnodes_core.agent.leases import Lease
from wnodes_core.errors import CommandError, Verdict, WnodesError
from wnodes_core.model import NativeCall
from wnodes_core.phases import Phase

COMMAND_S = 10.0


def wanted(lease: Lease, error: WnodesError) -> bool:
    """Whether this (bounded) error sends the job back to its queue."""
    return error.verdict is Verdict.REQUEUE and not lease.ran


def requeue(lease: Lease, error: WnodesError, hook: Any, environ: Mapping[str, str]) -> None:
    """Run the commands of the adapter's LAUNCH reply. Blocks.

    Raises CommandError, after all of them were tried (a job that may not be requeued is one reason).
    """
    facts = {"SLURM_JOB_ID": lease.job.job_id, "SLURMD_NODENAME": lease.job.node}
    reply = hook.wnodes_lrms_reply(call=NativeCall(Phase.LAUNCH, environ=facts), error=error, job=lease.job)
    failed: CommandError | None = None
    for argv in reply.commands if reply else ():
        try:
            command.run(argv, timeout_s=COMMAND_S, environ=environ)
        except CommandError as problem:
            failed = problem
    if failed:
        raise failed
