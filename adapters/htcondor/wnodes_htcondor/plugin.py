"""HTCondor adapter: the container runtime's calls and the machine's ads in core's words.

Contract (https://htcondor.readthedocs.io, admin-manual/singularity-support; measured on 23.9.6 and
25.14.1): the starter runs ``SINGULARITY`` as the job's user, once with ``test`` and once with ``exec``,
in the job's process family and cgroup. No hook of ours runs as root, so wnodesd itself tells the job:

* which run: the nearest ancestor that is a ``condor_starter`` of root's. Its end is the job's end here.
* which slot: that starter's own argv.
* which job, and what it was given: ``.job.ad`` and ``.machine.ad`` in the starter's working folder. The
  folder is the user's, who can remove the files or move others there, but cannot make one that
  belongs to HTCondor: only a file owned by whoever owns the folder above is believed. The most a
  user reaches is to show an ad of another job of their own; the slot still tells the two apart.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
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
    read_owned,
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
def wnodes_lrms_reply(
    call: NativeCall, error: errors.WnodesError | None, capacity: dict[str, Any] | None
) -> NativeReply:
    """``test`` never fails: the job would go back to its queue unbounded; ``exec`` meets the same error again.

    A startd that hears of no capacity must forget what it heard before, so an error is an answer too.
    """
    shown = f"wnodes: {error}\n" if error else ""
    if call.phase is Phase.ADVERTISE:
        return NativeReply(stdout=native.advertised(capacity), stderr=shown)
    return NativeReply(125 if error and call.phase is Phase.LAUNCH else 0, stderr=shown)


@hookimpl
def wnodes_lrms_owner(ancestry: Sequence[Process]) -> Owner | None:
    """The nearest starter of root's among the ancestors, and the job in its working folder."""
    for process in ancestry:
        if run_by_root(process, "condor_starter"):
            job_id = native.job_id(_ad(process, ".job.ad"))
            return Owner(job_id, "exec", process, True, native.slot_of(_argv(process)), last=True)
    return None


@hookimpl
def wnodes_lrms_claim(owner: Owner, uid: int, gid: int) -> Job | None:
    """The job as its starter knows it; the sandbox is its working folder."""
    job, machine = _ad(owner.root, ".job.ad"), _ad(owner.root, ".machine.ad")
    return Job(
        lrms="htcondor",
        job_id=owner.job_id,
        node=owner.node,
        uid=uid,
        gid=gid,
        user=pwd.getpwuid(uid).pw_name,
        cpus=native.number_of(machine, "Cpus"),
        memory_mib=native.number_of(machine, "Memory"),
        account=native.string_of(job, "AcctGroup"),
        work_dir=os.readlink(f"/proc/{owner.root.pid}/cwd"),
    )


def _ad(starter: Process, name: str) -> dict[str, native.Value]:
    """One of the ads that HTCondor itself wrote for this starter's job. Raises RequestError."""
    try:
        text = read_owned(f"/proc/{starter.pid}/cwd", name, limit=native.MAX_AD)
    except OSError as error:
        raise errors.RequestError(f"{name} of the job: {error}: want the one that HTCondor wrote") from error
    return native.parse_ad(text.decode(errors="replace"))


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
