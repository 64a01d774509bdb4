"""Hooks that an LRMS adapter implements, and the policy hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.errors import WnodesError
    from wnodes_core.model import Job, NativeCall, NativeReply, Owner, Process, VmRequest


@hookspec(firstresult=True)
def wnodes_lrms_read(call: NativeCall) -> tuple[VmRequest, Job | None] | None:
    """Called first in every hook script: is this a VM job, and what does it ask for?

    :param call: the hook's argv, environment and stdin as the LRMS gave them.
    :returns: the request and, where the LRMS itself (not the user) states them, the job's
        facts; None for an ordinary job, which is then left alone.
    :raises BadRequest: the user's option is malformed.
    """


@hookspec(firstresult=True)
def wnodes_lrms_reply(call: NativeCall, error: WnodesError | None, job: Job | None) -> NativeReply:
    """Called last in every hook script: say the outcome in the LRMS's own terms. Pure; never raises.

    :param call: the call that is answered.
    :param error: what went wrong (its ``verdict`` decides), or None.
    :param job: the job's facts as far as they are known.
    """


@hookspec(firstresult=True)
def wnodes_lrms_facts_query(job: Job) -> Sequence[str]:
    """Called before a lease is granted: the argv that makes the LRMS print what it gave the job.

    :param job: the job as far as ``wnodes_lrms_read`` could tell.
    """


@hookspec(firstresult=True)
def wnodes_lrms_facts_parse(job: Job, text: str) -> Job:
    """Called with the output of ``wnodes_lrms_facts_query``: the job with cpus, memory, queue filled in.

    :param job: the job as far as ``wnodes_lrms_read`` could tell.
    :param text: standard output of the query.
    """


@hookspec(firstresult=True)
def wnodes_lrms_owner(ancestry: Sequence[Process]) -> Owner | None:
    """Called when a process asks for a lease: which job do its ancestors belong to?

    :param ancestry: the asking process and its parents, nearest first, read from /proc by root.
    :returns: None if it does not descend from this LRMS's daemon. Trust only what a user
        cannot forge: the uid and executable of a root-owned ancestor, not its own words.
    """


@hookspec(firstresult=True)
def wnodes_lrms_claim(owner: Owner, uid: int, gid: int) -> Job | None:
    """Called when a process of a job asks for a VM that no hook of root's has prepared: the job as proved.

    For batch systems that run their hooks as the job's user. Where it is not implemented, only root
    prepares. ``wnodes_lrms_facts_query`` and ``_parse`` must then confirm the job (it runs, here, for
    this user) or raise TransientError; they are asked a few times, because a job may be too young to be known.

    :param owner: what ``wnodes_lrms_owner`` told from the ancestry.
    :param uid: the asking process's, from the kernel.
    :param gid: the asking process's, from the kernel.
    """


@hookspec(firstresult=True)
def wnodes_lrms_homes(owner: Owner, processes: Sequence[Process]) -> Process | None:
    """Called when a VM must outlive the step that starts it: whose cgroups may it live in?

    :param owner: the job and step that start the VM.
    :param processes: the process table.
    :returns: a process of the LRMS that lives as long as the job on this node, or None.
    """


@hookspec(firstresult=True)
def wnodes_lrms_live_query(node: str) -> Sequence[str]:
    """Called by the sweeper: the argv that makes the LRMS list the jobs on this node.

    :param node: the LRMS's name of this worker node.
    """


@hookspec(firstresult=True)
def wnodes_lrms_live_parse(text: str) -> frozenset[str]:
    """Called with the output of ``wnodes_lrms_live_query``: the ids of jobs that are not over.

    :param text: standard output of the query, which ended with exit code 0.
    """


@hookspec(firstresult=True)
def wnodes_lrms_advertise_query(node: str) -> Sequence[str]:
    """Called before ``wnodes_lrms_advertise``: the argv that makes the LRMS print what the node has now.

    :param node: the LRMS's name of this worker node.
    """


@hookspec(firstresult=True)
def wnodes_lrms_advertise(node: str, capacity: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Called when the node's images, templates or capacity changed: argv lists that publish them.

    :param node: the LRMS's name of this worker node.
    :param capacity: ``images`` (names in the cache), ``templates`` (names of images that start warm here),
        ``accel`` (kvm or tcg), ``leases`` (number),
        ``networks`` (names of those that the site confines to this node or to nobody),
        ``published`` (what ``wnodes_lrms_advertise_query`` printed).
    """


@hookspec
def wnodes_request_admit(request: VmRequest, job: Job) -> VmRequest | None:
    """Called before a lease is granted: may this user have this? All implementations are asked.

    :param request: the request with the site's defaults filled in.
    :param job: the job's facts.
    :returns: None to agree, or a changed request.
    :raises RequestError: to refuse; the message is shown to the user.
    """
