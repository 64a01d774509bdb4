"""The keeper holds its lease by an open connection; its end is the lease's end."""

from __future__ import annotations

import asyncio
from typing import Any

from wnodes_core import processes
from wnodes_core.agent import homes, identity
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.pool import slots_of
from wnodes_core.agent.protocol import Connection
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import RequestError, from_dict
from wnodes_core.model import Process

_PAUSE_S = 0.02  # between two messages of a keeper: it is a user's process and might chatter
_STATES = ("starting", "running", "ending", "failed", "gone", "paused")


class Holding:
    """The ``hold`` operation and what a keeper says while it holds."""

    def __init__(self, daemon: Daemon, warm: Warm) -> None:
        self._daemon = daemon
        self._warm = warm

    async def hold(self, connection: Connection, message: dict[str, Any]) -> None:
        """Give the lease to a keeper and stay with it until its connection or the lease ends.

        Raises RequestError for anybody but the keeper this lease waits for.
        """
        lease = self._claimed(connection, message)
        lease.holding += 1  # nobody gives the lease up meanwhile
        try:
            keeper = await self._daemon.quick(processes.read, connection.peer.pid, command_of_users=False)
            if keeper is None or not identity.peer_alive(connection.peer):
                raise RequestError(f"lease {lease.id}: the keeper ended while it claimed the lease")
            async with lease.lock:
                groups = await self._take(connection, lease, keeper)
        finally:
            lease.holding -= 1
        self._daemon.unwatch(lease, "starter")
        self._daemon.say(lease, "held", reason=f"keeper {keeper.pid}")
        try:
            reply = {"ok": True, "home": lease.home, "cgroups": groups}
            if await connection.send(reply, self._warm.fds(lease)):
                await self._listen(connection, lease)
        finally:
            connection.close()
            self._closed(connection, lease)

    def _claimed(self, connection: Connection, message: dict[str, Any]) -> Lease:
        lease = self._daemon.leases.get(str(message.get("lease")))
        if lease is None or connection.peer.uid != lease.job.uid or not lease.token_fits(message.get("token")):
            log.warning("claim refused", extra={"event": "denied", "uid": connection.peer.uid})
            raise RequestError(f"lease {str(message.get('lease'))[:40]!r}: not yours to hold")
        self._daemon.refuse_if_over(lease)
        return lease

    async def _take(self, connection: Connection, lease: Lease, keeper: Process) -> list[str]:
        self._daemon.refuse_if_over(lease)
        again = lease.keeper and (lease.keeper.pid, lease.keeper.started) == (keeper.pid, keeper.started)
        if lease.state is State.RUNNING and not again:
            raise RequestError(f"lease {lease.id}: process {lease.keeper.pid if lease.keeper else 0} holds it already")
        groups: list[str] = []
        if lease.home == "job" and not again:
            groups, home = await self._daemon.slow(self._settle, lease, keeper)
            if home:
                self._daemon.watch_job(lease, home)
        self._daemon.refuse_if_over(lease)
        lease.connection, lease.keeper, lease.state = connection, keeper, State.RUNNING
        await self._daemon.quick(lease.save)
        self._daemon.watch(lease, "keeper", keeper, lambda: self._daemon.end(lease, "the keeper ended"))
        return groups

    def _settle(self, lease: Lease, keeper: Process) -> tuple[list[str], Process | None]:
        hook = self._daemon.parts.hook_for(lease.job.lrms)
        table = list(processes.table(command_of_users=False))
        home: Process | None = hook.wnodes_lrms_homes(owner=lease.owner, processes=table)
        uids = {int(slot.name.partition("-")[0]) for slot in slots_of(lease)}
        others = [each for each in table if each.uid in uids]
        groups = homes.settle(lease.journal, keeper, home, lease.id, lease.job.job_id, others)
        return groups, home

    async def _listen(self, connection: Connection, lease: Lease) -> None:
        while (message := await connection.read(None)) is not None:
            if message.get("event") == "state":
                await self._state(connection, lease, message)
            await asyncio.sleep(_PAUSE_S)

    async def _state(self, connection: Connection, lease: Lease, message: dict[str, Any]) -> None:
        state = str(message.get("state"))
        if state not in _STATES:
            return
        lease.keeper_state = state
        self._daemon.metrics.heard(lease.timing, lease.timing.hear(message))
        # Told again with the failure: we may have been away when the guest came up.
        lease.ran = lease.ran or (state == "failed" and bool(message.get("ran")))
        if state == "failed" and isinstance(message.get("error"), dict):
            told = message["error"]
            error = await self._daemon.fail(lease, from_dict({**told, "message": str(told.get("message"))[:4000]}))
            await connection.send({"op": "verdict", "error": error.to_dict(), "verdict": str(error.verdict)})
        if state == "running" and not lease.ran:
            lease.ran = True  # noted once: a keeper that flaps costs us neither syncs nor log
            self._daemon.say(lease, "running")
            self._warm.began(lease)
            await self._daemon.save(lease)

    def _closed(self, connection: Connection, lease: Lease) -> None:
        if lease.connection is connection:
            lease.connection = None
            if not self._daemon.stopping:
                self._daemon.end(lease, "the keeper let go of the lease")
