"""HTCondor adapter: the container runtime's calls and the machine's ads in core's words.

Contract (https://htcondor.readthedocs.io, admin-manual/singularity-support; measured on 23.9.6 and
25.14.1): the starter runs ``SINGULARITY`` as the job's user, once with ``test`` and once with ``exec``,
in the job's process family and cgroup. No hook of ours runs as root, so wnodesd itself tells the job:

* which run: the nearest ancestor that is a ``condor_starter`` of root's. Its end is the job's end here.
* which slot: that starter's own argv.
* which job: ``.job.ad`` in the starter's working folder says so, which is the user's to change; so the
  startd must confirm that this very slot runs this very job (``condor_who``), and what it gave it.

A forged ad therefore names at most another job than the slot's, which the startd denies.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wnodes_core.api import (
    Job,
    NativeCall,
    NativeReply,
    Owner,
    Phase,
    Process,
    VmRequest,
    errors,
    hookimpl,
    read_beneath,
    run_by_root,
)
from wnodes_htcondor import native, task

wnodes_api = 1


@hookimpl
def wnodes_lrms_read(call: NativeCall) -> tuple[VmRequest, Job | None] | None:
    """The user's own ad says what is wanted; wnodesd knows the job."""
    if call.phase in (Phase.PREPARE, Phase.LAUNCH):
        request = native.request_from(task.job_ad(call.environ))
        return (request, None) if request else None
    return VmRequest(), None


@hookimpl
def wnodes_lrms_reply(call: NativeCall, error: errors.WnodesError | None) -> NativeReply:
    """``test`` never fails: the job would go back to its queue unbounded; ``exec`` meets the same error again."""
    shown = f"wnodes: {error}\n" if error else ""
    return NativeReply(125 if error and call.phase is Phase.LAUNCH else 0, stderr=shown)


@hookimpl
def wnodes_lrms_owner(ancestry: Sequence[Process]) -> Owner | None:
    """The nearest starter of root's among the ancestors, and the job that its working folder names."""
    for process in ancestry:
        if run_by_root(process, "condor_starter"):
            slot = native.slot_of(_argv(process))
            return Owner(native.job_id(_job_ad(process)), "exec", process, True, slot, last=True)
    return None


def _job_ad(starter: Process) -> dict[str, native.Value]:
    """The ad in a starter's working folder: the user's word. Raises RequestError."""
    try:
        text = read_beneath(f"/proc/{starter.pid}/cwd", ".job.ad", limit=native.MAX_AD)
    except OSError as error:
        raise errors.RequestError(f"the job's ad cannot be read: {error}") from error
    return native.parse_ad(text.decode(errors="replace"))


@hookimpl
def wnodes_lrms_claim(owner: Owner, uid: int, gid: int) -> Job | None:
    """The job that the startd is to confirm; its sandbox is its working folder."""
    try:
        sandbox, user = os.readlink(f"/proc/{owner.root.pid}/cwd"), pwd.getpwuid(uid).pw_name
    except (OSError, KeyError) as error:
        raise errors.RequestError(
            f"job {owner.job_id} of uid {uid}: {error}: want a running job and an account"
        ) from error
    return Job("htcondor", owner.job_id, owner.node, uid, gid, user, work_dir=sandbox)


@hookimpl
def wnodes_lrms_facts_query(job: Job) -> Sequence[str]:
    """The ads of all slots of this machine that run a job, from its startds: 40 ms."""
    del job
    return ("condor_who", "-long")


@hookimpl
def wnodes_lrms_facts_parse(job: Job, text: str) -> Job:
    """The job with what its slot has.

    Raises TransientError while the startd does not show it, RequestError for a forged id.
    """
    slot = native.slot_ad(text, job.node)
    if slot is None:
        raise errors.TransientError(f"job {job.job_id}: the startd shows no job in slot {job.node!r}")
    running = native.string_of(slot, "JobId")
    if running != job.job_id:
        raise errors.RequestError(f"slot {job.node} runs job {running!r}, and not {job.job_id!r} as the job's ad says")
    cpus, memory = native.number_of(slot, "Cpus"), native.number_of(slot, "Memory")
    return replace(job, cpus=cpus, memory_mib=memory, account=native.account_of(slot))


def _argv(starter: Process) -> list[str]:
    try:
        with open(f"/proc/{starter.pid}/cmdline", "rb") as file:
            return file.read(1 << 16).decode(errors="replace").split("\0")
    except OSError:
        return []


@hookimpl
def wnodes_lrms_live_query(node: str) -> Sequence[str]:
    """The jobs that the startds of this machine run: a starter that a dead startd left is no longer known."""
    del node
    return ("condor_who", "-af", "JobID")


@hookimpl
def wnodes_lrms_live_parse(text: str) -> frozenset[str]:
    """Job ids, one a line."""
    return frozenset(text.split())


@hookimpl
def wnodes_lrms_advertise(node: str, capacity: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Nothing to run: the startd asks by itself (``STARTD_CRON``)."""
    del node, capacity
    return ()
