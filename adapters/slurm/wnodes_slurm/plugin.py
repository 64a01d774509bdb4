"""Slurm adapter: Prolog, Epilog and SPANK launch in core's words.

Contract (https://slurm.schedmd.com/prolog_epilog.html and spank.html, read and measured for 22.05.8):
Prolog and Epilog run as root without PATH; any non-zero exit DRAINS THE NODE, so only a host proved
sick may give one. A job is refused by ``scancel`` and exit 0. What a Prolog prints goes nowhere: the
user reads AdminComment (``scontrol show job``) and, at a terminal, ``scontrol notify``.
"""

from __future__ import annotations

import os
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
    run_by_root,
)
from wnodes_slurm import native

wnodes_api = 1
# hooks/slurm/prolog turns 100 into 1: Python's own "I crashed" is 1 too, and may not drain a node.
EXIT_DRAIN = 100


@hookimpl
def wnodes_lrms_read(call: NativeCall) -> tuple[VmRequest, Job | None] | None:
    """Slurm's own environment of a Prolog; the option's text elsewhere."""
    if call.phase is Phase.PREPARE:
        request = native.request_from(call.environ)
        return (request, native.job_from(call.environ)) if request else None
    if call.phase is Phase.FINISH:
        return VmRequest(), native.job_from(call.environ)  # Epilog's caller looked for option or marker
    if call.phase in (Phase.LAUNCH, Phase.ADVERTISE):
        return VmRequest(), None  # a task's environment is the user's: wnodesd knows the job
    request = native.request_from(call.environ) if call.phase is Phase.SUBMIT else None
    return (request, None) if request else None


@hookimpl
def wnodes_lrms_reply(call: NativeCall, error: errors.WnodesError | None, job: Job | None) -> NativeReply:
    """The outcome in Slurm's terms; needs no more than ``call``, so it also answers for a bug."""
    del job  # the Prolog's environment names it even where reading the request failed
    if error is None or call.phase in (Phase.FINISH, Phase.ADVERTISE):
        return NativeReply(stderr=_shown(error))
    if call.phase is Phase.PREPARE:
        return _refuse(call, error)
    if call.phase is Phase.LAUNCH and error.verdict is not errors.Verdict.HOLD:
        return NativeReply(1, stderr=_shown(error), commands=_requeue(call))
    return NativeReply(1, stderr=_shown(error))


def _refuse(call: NativeCall, error: errors.WnodesError) -> NativeReply:
    job_id, text = call.environ.get("SLURM_JOB_ID", ""), "wnodes: " + native.one_line(str(error))
    tell = (
        ("scontrol", "update", f"JobId={job_id}", f"AdminComment={text}"),
        ("scontrol", "notify", job_id, text),
    )
    if error.verdict is errors.Verdict.DRAIN:
        node = call.environ.get("SLURMD_NODENAME", "")
        drain = ("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={text}")
        return NativeReply(EXIT_DRAIN, stderr=_shown(error), commands=(*tell, drain))
    if error.verdict is errors.Verdict.REQUEUE:
        # Only a batch job can be requeued; what still runs then is cancelled.
        cancel = ("scancel", "--state=RUNNING", job_id)
        return NativeReply(stderr=_shown(error), commands=(*tell, *_requeue(call), cancel))
    return NativeReply(stderr=_shown(error), commands=(*tell, ("scancel", job_id)))


def _requeue(call: NativeCall) -> tuple[tuple[str, ...], ...]:
    """Once; a job that comes back a second time is held by its verdict instead."""
    restarts = call.environ.get("SLURM_JOB_RESTART_COUNT") or call.environ.get("SLURM_RESTART_COUNT") or "0"
    return (("scontrol", "requeue", call.environ.get("SLURM_JOB_ID", "")),) if restarts == "0" else ()


def _shown(error: errors.WnodesError | None) -> str:
    return f"wnodes: {error}\n" if error else ""


@hookimpl
def wnodes_lrms_facts_query(job: Job) -> Sequence[str]:
    """Six milliseconds of slurmctld's time, for VM jobs only."""
    return ("scontrol", "-d", "-o", "show", "job", job.job_id)


@hookimpl
def wnodes_lrms_facts_parse(job: Job, text: str) -> Job:
    """CPUs and memory of this node out of ``scontrol -d -o show job``."""
    return native.facts_from(job, text)


@hookimpl
def wnodes_lrms_owner(ancestry: Sequence[Process]) -> Owner | None:
    """The nearest root-run slurmstepd among the ancestors, and the job in its title."""
    for process in ancestry:
        title = native.step_of(process.command) if _is_slurmstepd(process) else None
        if title:
            job_id, step = title
            return Owner(job_id, step, process, step in native.JOB_LONG, _node(process.pid, job_id))
    return None


@hookimpl
def wnodes_lrms_homes(owner: Owner, processes: Sequence[Process]) -> Process | None:
    """The ``sleep`` of the job's extern step on this node (``PrologFlags=Contain``), which lives as long as the job.

    Its cgroups, not those of its slurmstepd, are the ones that jobacct_gather/cgroup reads.
    """
    wanted = (owner.job_id, "extern")
    for process in processes:
        is_extern = native.step_of(process.command) == wanted and _is_slurmstepd(process)
        if is_extern and _node(process.pid, owner.job_id) == owner.node:
            return next((child for child in processes if child.parent == process.pid), process)
    return None


def _is_slurmstepd(process: Process) -> bool:
    """Whether root runs this by Slurm's name (Debian's ends in ``-wlm``)."""
    return run_by_root(process, "slurmstepd")


def _node(pid: int, job_id: str) -> str:
    """The node whose slurmd started this slurmstepd, from the socket it listens on in that node's spool."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return ""
    inodes = frozenset(link[8:-1] for link in links if link.startswith("socket:["))
    names = (native.node_of(path, job_id) for path in native.sockets_of(text, inodes))
    return next((name for name in names if name), "")


@hookimpl
def wnodes_lrms_live_query(node: str) -> Sequence[str]:
    """Every job id (of array tasks their own) that slurmctld has on this node, completing ones too."""
    return ("squeue", "--noheader", f"--nodelist={node}", "--format=%A")


@hookimpl
def wnodes_lrms_live_parse(text: str) -> frozenset[str]:
    """Job ids, one a line."""
    return frozenset(text.split())


@hookimpl(optionalhook=True)
def wnodes_lrms_advertise_query(node: str) -> Sequence[str]:
    """What the node shows now: scontrol replaces the whole list, so the site's own features must be known."""
    return ("scontrol", "-o", "show", "node", node)


@hookimpl
def wnodes_lrms_advertise(node: str, capacity: dict[str, Any]) -> Sequence[Sequence[str]]:
    """``vm``, ``vm_NAME`` for every cached image, ``warm_NAME`` where a clone of it can start, beside a site's own.

    ``capacity["published"]`` is what ``wnodes_lrms_advertise_query`` printed; without it nothing is touched.
    A ``warm_WORD`` is ours only beside its ``vm_WORD``: a site may have a warm aisle. ``vmnet_NAME`` is a network.
    """
    now = native.features_of(str(capacity.get("published", "")))
    if now is None:
        return ()
    images = {*capacity["images"], *(name[3:] for name in now if name.startswith("vm_"))}
    old = {"vm", *(f"{kind}_{name}" for name in images for kind in ("vm", "warm"))}
    site = [name for name in now if name not in old and not name.startswith("vmnet_")]
    warm = sorted(f"warm_{name}" for name in capacity.get("templates", ()) if name in capacity["images"])
    ours = ["vm", *sorted(f"vm_{name}" for name in capacity["images"]), *warm]
    ours += sorted(f"vmnet_{name}" for name in capacity.get("networks", ()))
    wanted = ",".join([*site, *ours])
    if now == [*site, *ours]:
        return ()
    return (("scontrol", "update", f"NodeName={node}", f"AvailableFeatures={wanted}", f"ActiveFeatures={wanted}"),)
