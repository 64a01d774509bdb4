"""A job is admitted: its facts, the site's policy, its lease.

Two roads lead here. Root's hook says which job it is (a Prolog): its word counts. Or a process of
the job itself asks, because the batch system runs its hooks as the job's user: then nothing that
it says of itself counts, but where it stands in the process table, and what the batch system
answers when asked about the job that this names.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import Any

from wnodes_core import command, processes
from wnodes_core.agent import identity
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.images import Images
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.protocol import Peer
from wnodes_core.agent.verdicts import run_name
from wnodes_core.errors import BadRequest, CommandError, RequestError, TransientError, Verdict, WnodesError
from wnodes_core.model import Job, Owner, VmRequest

FINISH_S = 6.0  # a hook waits so long at most; the end goes on without it
FACTS_S = 5.0
# A job that has just been started may not be known as running yet: asked again after these pauses.
PAUSES_S = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
_AT_ONCE = 4  # reads of /proc for one uid at the same time: one user's flood delays no other


class Admitting:
    """Makes leases, for root's hooks and for the processes of jobs."""

    def __init__(self, daemon: Daemon, images: Images) -> None:
        self._daemon = daemon
        self._images = images
        self._turns: dict[int, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))
        # By who claims, too: a claim that is forged is looked at for seconds, and keeps nobody else waiting.
        self._one_job: dict[tuple[str, str, str, int], asyncio.Lock] = {}

    async def admit(self, job: Job, request: VmRequest, *, owner: Owner | None = None) -> Lease:
        """The job's lease, made now unless it is prepared already. ``owner``: identity proved by ancestry.

        Raises WnodesError.
        """
        began = time.monotonic()
        daemon = self._daemon
        hook = await daemon.quick(daemon.parts.hook_for, job.lrms)
        job = await self._proved(hook, job) if owner else await daemon.quick(self._facts, hook, job)
        request = await daemon.quick(daemon.parts.admit, request, job, daemon.settings, hook)
        # Resolved here only so that an unknown or forbidden image is refused at once.
        await daemon.quick(self._images.resolve, request.image, job.uid)
        self._check_size(request, job)
        before = daemon.find(job.lrms, job.job_id, job.node)
        if before and before.state is State.PREPARED and (before.job, before.request) == (job, request):
            return before
        if before:  # an earlier run of a requeued job, whose end nobody told us
            await self.ended(before, "the job starts anew")
        lease = await daemon.create(job, request)
        lease.owner = owner
        if owner and owner.last:
            daemon.watch_job(lease, owner.root)
            await daemon.save(lease)
        note(daemon, lease, "admit", time.monotonic() - began)
        self._images.begin(lease)
        return lease

    # -- a process of the job asks ----------------------------------------------------------------

    async def owner(self, peer: Peer, lrms: str) -> Owner:
        """The job that this client stands in. Raises RequestError if it is none of this batch system's."""
        async with self._turns[peer.uid]:
            hook = await self._daemon.quick(self._daemon.parts.hook_for, lrms)
            owner: Owner = await self._daemon.quick(identity.owner_of, peer, hook)
        return owner

    async def claim(self, peer: Peer, lrms: str, owner: Owner, text: object) -> Lease:
        """The lease of the job that this client proved to stand in, made now if there is none of this run.

        ``text`` is the request in its grammar, the user's own words. Raises WnodesError; its REQUEUE is bounded.
        """
        job = await self._claimed(peer, lrms, owner)
        place = (lrms, job.job_id, job.node)
        key = (*place, peer.uid)
        lock = self._one_job.setdefault(key, asyncio.Lock())
        try:
            async with lock, self._turns[peer.uid]:
                found = self._of_this_run(self._daemon.find(*place), owner, job)
                if found:
                    found.owner = owner  # this run's from now on: an earlier one's late end must not end it
                return found or await self.admit(job, request_of(text), owner=owner)
        except WnodesError as error:
            raise await self._bounded(error, job, owner) from error
        finally:
            if not lock.locked():
                self._one_job.pop(key, None)

    async def _claimed(self, peer: Peer, lrms: str, owner: Owner) -> Job:
        """The job as its own process may speak for it. Raises RequestError where only root may."""
        hook = await self._daemon.quick(self._daemon.parts.hook_for, lrms)
        job: Job | None = await self._daemon.quick(hook.wnodes_lrms_claim, owner=owner, uid=peer.uid, gid=peer.gid)
        if job is None:
            raise RequestError(
                f"job {owner.job_id} has no VM on node {owner.node or 'this node'} that is yours to claim"
            )
        return job

    def claiming(self, peer: Peer, lrms: str, owner: Owner) -> bool:
        """Whether a claim by this user to this job is looked at right now."""
        return (lrms, owner.job_id, owner.node, peer.uid) in self._one_job

    def known(self, owner: Owner, lrms: str, hook: Any, peer: Peer) -> Lease | None:
        """The lease that this client may have: of this run of its job, where runs can be told apart."""
        lease = self._daemon.find(lrms, owner.job_id, owner.node)
        job = hook.wnodes_lrms_claim(owner=owner, uid=peer.uid, gid=peer.gid) if lease else None
        return self._of_this_run(lease, owner, job) if job else lease

    @staticmethod
    def _of_this_run(lease: Lease | None, owner: Owner, job: Job) -> Lease | None:
        """The lease, unless it is of an earlier run of the job or of somebody else."""
        if lease is None or lease.job.uid != job.uid:
            return None
        same = lease.owner is not None and _birth(lease.owner) == _birth(owner)
        return lease if same or lease.state in (State.PREPARING, State.PREPARED) else None

    async def _proved(self, hook: Any, job: Job) -> Job:
        """The job with what the batch system says of it; it must know the job as one that runs here, of this user."""
        problem: WnodesError = TransientError(f"job {job.job_id}: the batch system was not asked")
        for pause in PAUSES_S:
            await asyncio.sleep(pause)
            try:
                return await self._daemon.slow(self._facts, hook, job, strict=True)  # type: ignore[no-any-return]
            except TransientError as error:
                problem = error
        raise problem

    async def _bounded(self, error: WnodesError, job: Job, owner: Owner) -> WnodesError:
        bounded: WnodesError = await self._daemon.quick(self._daemon.verdicts.bound, error, job.key, run_name(owner))
        bounded.again = bounded.verdict is Verdict.REQUEUE
        log.warning("job %s: %s", job.key, bounded.message, extra={"event": "refused", "job": job.key})
        return bounded

    async def over(self, peer: Peer, lrms: str, wait: bool) -> bool:
        """A process below the batch system's daemon says that its job is over; whether the lease has gone.

        Believed only once the job's root process has ended: such hooks come twice, late, or when the
        user likes.
        """
        owner = await self.owner(peer, lrms)
        await self._claimed(peer, lrms, owner)
        lease = self._daemon.find(lrms, owner.job_id, owner.node)
        if lease is None:
            return True
        if lease.job.uid != peer.uid:
            raise RequestError(f"job {owner.job_id} is of uid {lease.job.uid}, not of uid {peer.uid}")
        if lease.owner and _birth(lease.owner) != _birth(owner) and await self._daemon.quick(_runs, lease.owner):
            return False
        return await self.ended(lease, "the job is over", wait_s=FINISH_S if wait else 0.0)

    # -- both roads -------------------------------------------------------------------------------

    async def ended(self, lease: Lease, reason: str, wait_s: float = FINISH_S) -> bool:
        """End a lease whose job is over; whether that was done within ``wait_s``."""
        ending = self._daemon.end(lease, reason, job_over=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), wait_s)
        return lease.id not in self._daemon.leases

    def _check_size(self, request: VmRequest, job: Job) -> None:
        """Refuse at once, and not only in front of the first task, what is too small for a VM."""
        accel = self._daemon.accel
        if accel is not None and accel.done() and not accel.exception():
            self._daemon.parts.check_size(request, job, self._daemon.settings, accel.result())

    def _facts(self, hook: Any, job: Job, *, strict: bool = False) -> Job:
        """The job with what the batch system says of it; blocks for its command.

        ``strict``: raises TransientError if it says nothing.
        """
        argv = hook.wnodes_lrms_facts_query(job=job)
        if not argv:
            return job
        try:
            done = command.run(argv, timeout_s=FACTS_S, environ=self._daemon.parts.environ(job.lrms))
        except CommandError as error:
            if strict:
                raise TransientError(f"job {job.job_id}: the batch system does not confirm it: {error}") from error
            log.warning("job facts: %s", error, extra={"event": "facts", "job": job.key})
            return job
        told: Job | None = hook.wnodes_lrms_facts_parse(job=job, text=done.text)
        # Identity is what the hook said; the query only fills in sizes and names.
        return replace(told, job_id=job.job_id, node=job.node, uid=job.uid, lrms=job.lrms) if told else job


def request_of(text: object) -> VmRequest:
    """A user's request in its grammar; '' leaves all to the site's policy. Raises BadRequest."""
    if not isinstance(text, str) or not text.isprintable():
        raise BadRequest(f"request {str(text)[:40]!r}: want printable text as in image=el9,cpus=2")
    return VmRequest.parse(text) if text else VmRequest()


def _birth(owner: Owner) -> tuple[int, int]:
    return owner.root.pid, owner.root.started


def _runs(owner: Owner) -> bool:
    return processes.alive(owner.root)


def note(daemon: Daemon, lease: Lease, phase: str, seconds: float) -> None:
    """Put a phase of our own into the lease's trace and the metrics."""
    lease.timing.note(phase, seconds)
    daemon.metrics.observe(phase, seconds)
