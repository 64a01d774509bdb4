"""What clients may ask, and who may ask it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from wnodes_core import __version__
from wnodes_core.agent import words
from wnodes_core.agent.admitting import Admitting
from wnodes_core.agent.becoming import Becoming
from wnodes_core.agent.daemon import Daemon
from wnodes_core.agent.holding import Holding
from wnodes_core.agent.images import Images
from wnodes_core.agent.launching import Launching
from wnodes_core.agent.leases import State
from wnodes_core.agent.pool import Pool
from wnodes_core.agent.protocol import Connection
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import BadRequest, RequestError

Reply = dict[str, Any] | None


class Operations:
    """One method an operation of the wire protocol."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.images = Images(daemon)
        self.warm = Warm(daemon)
        self.pool = Pool(daemon, self.warm)
        daemon.undoer.let_out = self.warm.undo
        daemon.warm_images = self.warm.images
        daemon.warm_gauges = lambda: {**self.warm.gauges(), "pool_idle": len(self.pool.idle)}
        self.admitting = Admitting(daemon, self.images)
        self.launching = Launching(daemon, self.images, self.warm, self.admitting, self.pool)
        self.holding = Holding(daemon, self.warm)
        self.becoming = Becoming(daemon)
        self._table: dict[str, Callable[[Connection, dict[str, Any]], Awaitable[Reply]]] = {
            "prepare": self.prepare,
            "finish": self.finish,
            "launch": self.launching.launch,
            "hold": self.holding.hold,
            "become": self.becoming.become,
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
        """Admit a job by policy, mark it as a VM job on this node, start to fetch its image.

        For root's hook; or for a process of the job itself, which is answered once it is known whose
        it is, unless it wants to ``wait`` for the outcome.
        """
        lrms = words.check_lrms(message.get("lrms"))
        if connection.peer.uid == 0:
            job, request = words.job_of(message.get("job"), lrms), words.request_of(message.get("request"))
            return {"ok": True, "lease": (await self.admitting.admit(job, request)).id}
        owner = await self.admitting.owner(connection.peer, lrms)
        claim = partial(self.admitting.claim, connection.peer, lrms, owner, message.get("request"))
        if not message.get("wait"):
            if not self.admitting.claiming(connection.peer, lrms, owner):
                self._daemon.background(claim(), f"preparation of job {owner.job_id}")
            return {"ok": True, "pending": True}
        lease = await claim()
        self._daemon.refuse_if_over(lease)
        return {"ok": True, "lease": lease.id}

    async def finish(self, connection: Connection, message: dict[str, Any]) -> Reply:
        """End a job's lease, if there is one; the job is over."""
        lrms = words.check_lrms(message.get("lrms"))
        if connection.peer.uid != 0:
            gone = await self.admitting.over(connection.peer, lrms, bool(message.get("wait")))
            return {"ok": True, "pending": not gone}
        job_id = words.check_word("job id", message.get("job_id"))
        node = words.check_word("node", message.get("node"))
        over = [
            each
            for each in list(self._daemon.leases.values())
            if (each.job.lrms, each.job.job_id, each.job.node) == (lrms, job_id, node)
        ]
        done = await asyncio.gather(*(self.admitting.ended(each, "the job is over") for each in over))
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
