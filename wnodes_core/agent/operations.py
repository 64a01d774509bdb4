"""What clients may ask, and who may ask it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from wnodes_core import __version__, command
from wnodes_core.agent import leases
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.holding import Holding
from wnodes_core.agent.images import Images
from wnodes_core.agent.launching import Launching
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.protocol import Connection
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import BadRequest, CommandError, RequestError
from wnodes_core.model import Job, VmRequest

Reply = dict[str, Any] | None
FINISH_S = 6.0  # an Epilog waits so long at most; the end goes on without it
FACTS_S = 5.0


class Operations:
    """One method an operation of the wire protocol."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.images = Images(daemon)
        self.warm = Warm(daemon)
        daemon.undoer.let_out = self.warm.undo
        daemon.warm_images, daemon.warm_gauges = self.warm.images, self.warm.gauges
        self.launching = Launching(daemon, self.images, self.warm)
        self.holding = Holding(daemon, self.warm)
        self._table: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Reply]]] = {
            "prepare": self.prepare,
            "finish": self.finish,
            "launch": self.launching.launch,
            "hold": self.holding.hold,
            "leases": self.leases,
            "status": self.status,
            "release": self.release,
        }

    async def answer(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """The reply to one message; None if the operation has replied itself.

        Raises WnodesError.
        """
        operation = self._table.get(str(message.get("op")))
        if operation is None:
            raise BadRequest(f"op {str(message.get('op'))[:40]!r}: want one of {', '.join(self._table)}")
        return await operation(connection, message)

    async def prepare(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """Admit a job by policy, mark it as a VM job on this node, start to fetch its image."""
        _root_only(connection, "prepare")
        began = time.monotonic()
        lrms = leases.check_lrms(message.get("lrms"))
        job, request = leases.job_of(message.get("job"), lrms), leases.request_of(message.get("request"))
        daemon = self._daemon
        hook = await daemon.quick(daemon.parts.hook_for, lrms)
        job = await daemon.quick(self._facts, hook, job)
        request = await daemon.quick(daemon.parts.admit, request, job, daemon.settings, hook)
        # Resolved here only so that an unknown or forbidden image is refused at once.
        await daemon.quick(self.images.resolve, request.image, job.uid)
        self._check_size(request, job)
        before = daemon.find(lrms, job.job_id, job.node)
        if before and before.state is State.PREPARED and (before.job, before.request) == (job, request):
            return {"ok": True, "lease": before.id}
        if before:  # an earlier run of a requeued job, whose end nobody told us
            await self._ended(before, "the job starts anew")
        lease = await daemon.create(job, request)
        _note(daemon, lease, "admit", time.monotonic() - began)
        self.images.begin(lease)
        return {"ok": True, "lease": lease.id}

    def _check_size(self, request: VmRequest, job: Job) -> None:
        """Refuse at once, and not only in front of the first task, what is too small for a VM."""
        accel = self._daemon.accel
        if accel is not None and accel.done() and not accel.exception():
            self._daemon.parts.check_size(request, job, self._daemon.settings, accel.result())

    def _facts(self, hook: Any, job: Job) -> Job:
        """The job with what the batch system says of it; blocks for its command."""
        argv = hook.wnodes_lrms_facts_query(job=job)
        if not argv:
            return job
        try:
            done = command.run(argv, timeout_s=FACTS_S, environ=self._daemon.parts.environ(job.lrms))
        except CommandError as error:
            log.warning("job facts: %s", error, extra={"event": "facts", "job": job.key})
            return job
        told: Job | None = hook.wnodes_lrms_facts_parse(job=job, text=done.text)
        # Identity is what the hook said; the query only fills in sizes and names.
        return replace(told, job_id=job.job_id, node=job.node, uid=job.uid, lrms=job.lrms) if told else job

    async def _ended(self, lease: Lease, reason: str) -> bool:
        ending = self._daemon.end(lease, reason, job_over=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), FINISH_S)
        return lease.id not in self._daemon.leases

    async def finish(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """End a job's lease, if there is one; the job is over."""
        _root_only(connection, "finish")
        lrms = leases.check_lrms(message.get("lrms"))
        job_id = leases.check_word("job id", message.get("job_id"))
        node = leases.check_word("node", message.get("node"))
        over = [
            each
            for each in list(self._daemon.leases.values())
            if (each.job.lrms, each.job.job_id, each.job.node) == (lrms, job_id, node)
        ]
        done = await asyncio.gather(*(self._ended(each, "the job is over") for each in over))
        return {"ok": True, "pending": not all(done)}

    async def release(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """End one lease by its id: for its owner and root."""
        lease = self._daemon.leases.get(str(message.get("lease")))
        if lease is None or connection.peer.uid not in (0, lease.job.uid):
            raise RequestError(f"lease {str(message.get('lease'))[:40]!r}: no such lease of yours")
        ending = self._daemon.end(lease, f"released by uid {connection.peer.uid}")
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), 30)
        return {"ok": True, "pending": lease.state is State.ENDING}

    async def leases(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """All leases for root, their own for others; with ``ended``, those that are over too."""
        uid = connection.peer.uid
        ended = self._daemon.history.of(uid) if message.get("ended") else []
        shown = [lease.shown() for lease in self._daemon.leases.values() if uid in (0, lease.job.uid)]
        return {"ok": True, "leases": ended + shown}

    async def status(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """What this daemon is and how it fares."""
        accel = self._daemon.accel
        known = accel is not None and accel.done() and not accel.exception()
        return {
            "ok": True,
            "version": __version__,
            "pid": os.getpid(),
            "since": self._daemon.started,
            "accel": accel.result() if known and accel else "",
            "leases": len(self._daemon.leases),
            "state_dir": self._daemon.settings.state_dir,
        }


def _root_only(connection: Connection, operation: str) -> None:
    if connection.peer.uid != 0:
        raise RequestError(f"{operation} is for root, not for uid {connection.peer.uid}")


def _note(daemon: Daemon, lease: Lease, phase: str, seconds: float) -> None:
    lease.timing.note(phase, seconds)
    daemon.metrics.observe(phase, seconds)


