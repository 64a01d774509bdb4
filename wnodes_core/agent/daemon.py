"""What wnodesd is while it runs: its leases, its threads, and how a lease changes and ends.

Everything here runs in one event loop. Whatever may block (fsync, /proc, the image store, a
batch system's commands) runs in a thread, so that no client ever waits for another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from wnodes_core import processes
from wnodes_core.agent import leases, requeueing
from wnodes_core.agent.accounts import Accounts
from wnodes_core.agent.collaborators import Parts as Parts
from wnodes_core.agent.ending import Undoer
from wnodes_core.agent.exports import Exports
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.metrics import Metrics
from wnodes_core.agent.ports import Ports
from wnodes_core.agent.verdicts import Verdicts, run_name
from wnodes_core.agent.volumes import Volumes
from wnodes_core.errors import WnodesError, from_dict
from wnodes_core.history import History
from wnodes_core.model import Job, Process, VmRequest

log = logging.getLogger("wnodesd")
T = TypeVar("T")


class Daemon:
    """The leases of this node."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.settings = parts.settings
        self.leases: dict[str, Lease] = {}
        self.history = History(self.settings.state_dir)
        self.warm_images: Callable[[], Iterable[str]] = tuple  # digests of images with a template here; blocks
        self.warm_gauges: Callable[[], Mapping[str, float]] = dict  # ``templates``, ``pool_idle``
        self.metrics = Metrics(self.leases.values, lambda: self.warm_gauges())
        self.verdicts = Verdicts(f"{self.settings.state_dir}/requeues.json")
        self.ports = Ports(lambda: self.settings.network, lambda: self.parts.hook_for(""))
        self.volumes = Volumes(lambda: self.settings.scratch, lambda: self.parts.hook_for(""), parts.settings.state_dir)
        self.exports = Exports(lambda: self.parts.hook_for(""), self.settings.run_dir)
        self.accounts = Accounts()
        self.undoer = Undoer(
            parts.store,
            makers={"account": self.accounts, "export": self.exports, "port": self.ports, "volume": self.volumes},
        )
        self.accel: asyncio.Future[str] | None = None
        self.stopping = False
        self.started = time.time()
        self.advertise_wanted = asyncio.Event()
        self.leases_changed = asyncio.Event()
        self._quick = ThreadPoolExecutor(16, "quick")
        self._slow = ThreadPoolExecutor(32, "slow")
        self._fetching = ThreadPoolExecutor(64, "fetch")
        self._tasks: set[asyncio.Task[Any]] = set()

    async def quick(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what blocks for milliseconds in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, partial(function, *args, **kwargs))

    async def slow(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what may block for minutes in a thread of another pool."""
        return await asyncio.get_running_loop().run_in_executor(self._slow, partial(function, *args, **kwargs))

    async def fetching(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what waits for an image: a full node of such jobs must not keep others from their end."""
        return await asyncio.get_running_loop().run_in_executor(self._fetching, partial(function, *args, **kwargs))

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``; a cancelled caller leaves it to run to its end, with the locks that it holds."""
        return await asyncio.shield(self.background(work, "a part of a launch"))

    def background(self, work: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
        """Run a coroutine on its own; a failure is logged, never lost."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._report, what))
        return task

    def _report(self, what: str, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, WnodesError):
            log.warning("%s: %s", what, error, extra={"event": "failed"})
        elif error is not None:
            log.error("%s failed", what, exc_info=error, extra={"event": "bug"})

    # -- leases ---------------------------------------------------------------------------------

    def find(self, lrms: str, job_id: str, node: str) -> Lease | None:
        """The newest lease of a job; ``node`` '' matches if there is but one."""
        found = [
            each
            for each in self.leases.values()
            if each.job.lrms == lrms and each.job.job_id == job_id and node in ("", each.job.node)
        ]
        if not node and len({each.job.node for each in found}) > 1:
            return None
        return max(found, key=lambda each: each.created, default=None)

    async def create(self, job: Job, request: VmRequest) -> Lease:
        """A new lease, on disk and in memory."""
        where = (self.settings.state_dir, self.settings.run_dir, self.parts.journal)
        lease: Lease = await self.quick(leases.create, job, request, *where)
        self.leases[lease.id] = lease
        self.say(lease, "prepared")
        return lease

    def say(self, lease: Lease, event: str, **more: Any) -> None:
        """Log an event of a lease, wake who waits for it, tell the observers."""
        log.info("lease %s", event, extra={"event": event, "lease": lease.id, "job": lease.job.key, **more})
        lease.notify()
        self.leases_changed.set()
        self.background(self._observers(lease, event), "observers")

    async def _observers(self, lease: Lease, event: str) -> None:
        shown = lease.shown()
        hook = await self.quick(self.parts.hook_for, lease.job.lrms)
        await self.slow(hook.wnodes_lease_changed, lease=shown, event=event)

    async def save(self, lease: Lease) -> None:
        """Bring the lease's facts to disk."""
        async with lease.lock:
            if lease.state is not State.ENDING or lease.record in lease.journal.open_resources:
                await self.quick(lease.save)

    def watch(self, lease: Lease, name: str, process: Process, then: Callable[[], object]) -> None:
        """Call ``then`` once when exactly this process ends; at once if it is gone already."""
        self.unwatch(lease, name)
        fd = processes.open_pidfd(process)
        if fd is None:
            then()
            return
        lease.watches[name] = fd
        asyncio.get_running_loop().add_reader(fd, self._ended, lease, name, fd, then)

    def _ended(self, lease: Lease, name: str, fd: int, then: Callable[[], object]) -> None:
        if lease.watches.get(name) == fd:
            self.unwatch(lease, name)
            then()

    def unwatch(self, lease: Lease, name: str) -> None:
        """Stop watching; fine if nobody did."""
        fd = lease.watches.pop(name, None)
        if fd is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    def watch_job(self, lease: Lease, process: Process) -> None:
        """End the lease when the process that lives as long as the job has ended."""
        lease.root = process
        last = _last(lease)
        self.watch(lease, "job", process, lambda: self.end(lease, "the job's root process ended", job_over=last))

    # -- the end --------------------------------------------------------------------------------

    def end(self, lease: Lease, reason: str, *, job_over: bool = False) -> asyncio.Task[None]:
        """Begin (or go on) ending a lease; idempotent. ``job_over`` lets the marker go, too."""
        lease.job_over = lease.job_over or job_over
        if lease.ending is None or lease.ending.done():
            lease.reason = lease.reason or reason
            lease.ending = self.background(self._end(lease, reason), f"end of {lease.id}")
        return lease.ending

    async def _end(self, lease: Lease, reason: str) -> None:
        """Undo; and once more if meanwhile somebody said that the job itself is over."""
        while lease.id in self.leases and (lease.state is not State.OVER or lease.job_over):
            if lease.state is not State.OVER:
                await self._stop_keeper(lease, reason)
            over = lease.job_over
            async with lease.lock:
                errors = await self.slow(self.undoer.undo, lease, job_over=over)
            if errors:
                self._try_again_later(lease, errors)
                return
            await self._ended_well(lease, over)

    async def _stop_keeper(self, lease: Lease, reason: str) -> None:
        lease.state = State.ENDING
        for name in list(lease.watches):
            if name != "job" or not _last(lease):  # its end lets the marker go, too
                self.unwatch(lease, name)
        if lease.fetch:
            lease.fetch.cancel()
        self.say(lease, "ending", reason=reason)
        await self._save_anyway(lease)
        if lease.connection:
            connection = lease.connection
            await connection.send({"op": "end", "reason": reason})
            with suppress(TimeoutError):
                await asyncio.wait_for(connection.eof.wait(), self.parts.end_grace_s)

    async def _save_anyway(self, lease: Lease) -> None:
        try:
            async with lease.lock:
                await self.quick(lease.save)
        except (WnodesError, OSError) as error:  # a full disk must not stop an end
            log.error("%s", error, extra={"event": "journal", "lease": lease.id})

    def _try_again_later(self, lease: Lease, errors: list[Exception]) -> None:
        lease.tries += 1
        lease.retry_at = time.monotonic() + min(600.0, self.parts.retry_s * 2 ** min(lease.tries - 1, 10))
        for error in errors:
            notes = "; ".join(getattr(error, "__notes__", ()))
            log.error("undo: %s (%s)", error, notes, extra={"event": "undo", "lease": lease.id, "job": lease.job.key})

    async def _ended_well(self, lease: Lease, job_over: bool) -> None:
        if job_over:
            self.unwatch(lease, "job")
            self.leases.pop(lease.id, None)
            await self.quick(self.history.add, lease.shown())
            self.say(lease, "gone")
            return
        lease.state = State.OVER
        await self._save_anyway(lease)
        self.say(lease, "failed" if lease.error else "gone")

    async def fail(self, lease: Lease, error: WnodesError) -> WnodesError:
        """Note why the lease came to nothing; the error to report, its REQUEUE bounded."""
        attempt = (lease.id, *([run_name(lease.owner)] if lease.owner else []))
        bounded: WnodesError = await self.quick(self.verdicts.bound, error, lease.job.key, *attempt)
        if lease.error is None:
            bounded.again = requeueing.wanted(lease, bounded)
            lease.error = bounded.to_dict()
            self.metrics.errors.labels(str(bounded.verdict)).inc()
            extra = {"event": "error", "lease": lease.id, "job": lease.job.key, "error": lease.error["kind"]}
            log.warning("%s", bounded.message, extra=extra)
            if requeueing.wanted(lease, bounded):
                self.background(self._requeue(lease, bounded), f"requeue of {lease.job.key}")
        return bounded

    async def _requeue(self, lease: Lease, error: WnodesError) -> None:
        lrms = lease.job.lrms
        hook = await self.quick(self.parts.hook_for, lrms)
        await self.slow(requeueing.requeue, lease, error, hook, self.parts.environ(lrms))

    def refuse_if_over(self, lease: Lease) -> None:
        """Raise what the lease failed with, or say that it is over: its job may not run bare."""
        if lease.state in (State.ENDING, State.OVER) or lease.id not in self.leases:
            if lease.error:
                raise from_dict(lease.error)
            raise WnodesError(f"the VM of job {lease.job.job_id} has ended: {lease.reason or 'no reason given'}")

    # -- after a restart ------------------------------------------------------------------------

    def load(self) -> None:
        """Read every journal that an earlier wnodesd left. Blocks; called before clients are."""
        folder = Path(self.settings.state_dir, "journal")
        for path in sorted(folder.glob("*.jsonl")):
            try:
                lease = leases.load(path, self.parts.journal)
            except (OSError, KeyError, TypeError, ValueError, WnodesError):
                log.exception("journal %s cannot be read: left as it is", path, extra={"event": "journal"})
                continue
            if lease:
                self.leases[lease.id] = lease
                self.ports.adopt(lease)

    def readopt(self, lease: Lease, resume: Callable[[Lease], None]) -> None:
        """Go on with a lease of an earlier wnodesd: wait for its keeper, its launcher, or undo it."""
        log.info("found lease", extra={"event": "found", "lease": lease.id, "job": lease.job.key})
        other_boot = lease.boot_id != leases.boot_id()
        if lease.root and _last(lease) and not other_boot:
            self.watch_job(lease, lease.root)
        if lease.state is State.OVER and not other_boot:
            return
        if lease.state in (State.PREPARING, State.ENDING) or other_boot:
            over = other_boot or lease.state is State.PREPARING  # no job survives a reboot
            self.end(lease, lease.reason or "wnodesd or the node was restarted", job_over=over)
            return
        if lease.root:
            self.watch_job(lease, lease.root)
        if lease.state is State.RUNNING and lease.keeper:
            self.watch(lease, "keeper", lease.keeper, lambda: self.end(lease, "the keeper ended"))
        elif lease.state in (State.PREPARED, State.STARTING):
            resume(lease)


def _last(lease: Lease) -> bool:
    """Whether nothing of the job starts here any more once its root process has ended."""
    return lease.owner is not None and lease.owner.last
