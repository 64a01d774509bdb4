"""A task asks for its VM: whose job it is, and which of a job's tasks starts the keeper."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from wnodes_core.agent import leases, words
from wnodes_core.agent.admitting import Admitting
from wnodes_core.agent.claiming import HOLD_S, Claiming
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.images import Images
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.pool import Pool
from wnodes_core.agent.protocol import Connection
from wnodes_core.agent.slots import Slot
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import RequestError, WnodesError
from wnodes_core.model import Owner


class Launching:
    """The ``launch`` operation."""

    def __init__(self, daemon: Daemon, images: Images, warm: Warm, admitting: Admitting, pool: Pool) -> None:
        self._daemon = daemon
        self._images = images
        self._warm = warm
        self._admitting = admitting
        self._pool = pool
        self._claiming = Claiming(daemon, pool)

    async def launch(self, connection: Connection, message: dict[str, Any]) -> dict[str, Any] | None:
        """Grant the caller its job's lease: to start the keeper or, once one holds it, to join.

        None if the caller went away meanwhile. Raises WnodesError.
        """
        lrms = words.check_lrms(message.get("lrms"))
        lease, owner = await self._lease_of(connection, lrms, message.get("request"))
        self._daemon.refuse_if_over(lease)
        going = asyncio.ensure_future(self._granted(connection, message, lease, owner))
        gone = asyncio.ensure_future(connection.gone())
        try:
            await asyncio.wait({going, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await going if going.done() else None
        finally:
            for task in (going, gone):
                task.cancel()
            await asyncio.gather(going, gone, return_exceptions=True)

    async def _granted(
        self, connection: Connection, message: dict[str, Any], lease: Lease, owner: Owner
    ) -> dict[str, Any]:
        if lease.state is not State.RUNNING:
            await self._images.wait(connection, lease)
        while True:
            changed = asyncio.ensure_future(lease.changed())
            try:
                self._daemon.refuse_if_over(lease)
                if lease.state is State.RUNNING:
                    return self._grant(lease, "join")
                if lease.state is not State.PREPARED:
                    await changed
                elif grant := await self._start(connection, message, lease, owner):
                    return grant
            finally:
                changed.cancel()

    async def _lease_of(self, connection: Connection, lrms: str, request: object) -> tuple[Lease, Owner]:
        """The lease that was prepared, or one made now where the batch system's hooks are the user's own."""
        peer = connection.peer
        if request is None and not any(lease.job.lrms == lrms for lease in self._daemon.leases.values()):
            raise RequestError(f"no job of {lrms} has a VM on this node")
        owner = await self._admitting.owner(peer, lrms)
        hook = await self._daemon.quick(self._daemon.parts.hook_for, lrms)
        lease: Lease | None = await self._daemon.quick(self._admitting.known, owner, lrms, hook, peer)
        if lease is None and request is not None:
            lease = await self._admitting.claim(peer, lrms, owner, request)
        if lease is None:
            raise RequestError(f"job {owner.job_id} has no VM on node {owner.node or 'this node'}")
        if lease.job.uid != peer.uid:
            log.warning("foreign claim", extra={"event": "denied", "lease": lease.id, "uid": peer.uid})
            raise RequestError(f"job {owner.job_id} is of uid {lease.job.uid}, not of uid {peer.uid}")
        return lease, owner

    def _grant(self, lease: Lease, role: str, **more: Any) -> dict[str, Any]:
        disabled = list(self._daemon.settings.plugins.disabled)
        where = {"lease": lease.id, "folder": lease.folder, "home": lease.home, "disabled": disabled}
        site = self._daemon.settings.lrms.get(lease.job.lrms, {})
        if isinstance(site.get("host_commands"), list):  # what a site lets a guest ask the host for
            where["host_commands"] = [str(name) for name in site["host_commands"]]
        return {"ok": True, "role": role, **where, **more}

    async def _start(
        self, connection: Connection, message: dict[str, Any], lease: Lease, owner: Owner
    ) -> dict[str, Any] | None:
        """Elect the caller to start the keeper; None if one of the pool's has been told to take the lease."""
        lease.state = State.STARTING  # from here on, before the first await, nobody else is elected
        lease.starter = leases.process_of(connection.peer)
        lease.owner = owner
        lease.home = "step" if owner.job_long else "job"
        lease.root = owner.root if owner.job_long else None
        token = lease.new_token()
        try:
            await self._claiming.abandon(lease)
            plan = await self._plan(lease)
            for make in (self._port, self._volume, self._exports):
                plan.update(await make(lease, plan))
            if await self._pooled(connection, message, lease, plan, token):
                return None
            token = lease.new_token()  # what a keeper of the pool was told is void, and so is its timer
            await self._elected(lease)
        except WnodesError as error:
            bounded = await self._daemon.fail(lease, error)
            self._daemon.end(lease, bounded.message)
            raise bounded from error
        except BaseException:  # also a bug's or a disk's: another task of the job may still be served
            self._give_up(lease, lease.token_hash, "starter went away")
            raise
        self._daemon.refuse_if_over(lease)
        return self._grant(lease, "start", token=token, plan=plan)

    async def _pooled(
        self, connection: Connection, message: dict[str, Any], lease: Lease, plan: dict[str, Any], token: str
    ) -> bool:
        """Whether a clone that waited has the lease now; else all is as it was, but for ``lease.no_pool``."""
        slot = await self._claiming.slot_for(connection, lease, plan)
        if slot is None:
            return False
        starter, lease.starter = lease.starter, slot.keeper
        try:
            await self._elected(lease, slot)
        finally:
            self._pool.noted(lease, slot)
        self._daemon.refuse_if_over(lease)
        given = {**self._grant(lease, "pool"), "plan": plan, "token": token}
        if await self._claiming.hand_over(connection, message, lease, given, slot):
            return True
        lease.starter = starter
        self._daemon.refuse_if_over(lease)
        await self._claiming.abandon(lease)
        plan["fallback"] = lease.no_pool
        return False

    async def _plan(self, lease: Lease) -> dict[str, Any]:
        assert self._daemon.accel is not None
        accel = await asyncio.shield(self._daemon.accel)
        template = await self._warm.choose(lease, lease.image, accel) if lease.image else None
        arguments = (lease.request, lease.job, lease.image, self._daemon.settings, accel)
        plan: dict[str, Any] = await self._daemon.quick(
            self._daemon.parts.make_plan, *arguments, lease=lease.id, folder=lease.folder, template=template
        )
        return {**plan, "fallback": lease.no_pool or lease.no_clone}

    async def _port(self, lease: Lease, plan: dict[str, Any]) -> dict[str, Any]:
        """What root makes of the lease's network; its lock keeps an end from overtaking that."""
        if not lease.request.network:
            return {}
        own = await self._daemon.quick(self._daemon.exports.ports_for, plan)
        return await self._daemon.whole(self._attached(lease, partial(self._daemon.ports.attach, own=own)))

    async def _volume(self, lease: Lease, plan: dict[str, Any]) -> dict[str, Any]:
        """What root makes of the lease's scratch, in the same way."""
        if not lease.request.scratch_mib:
            return {}
        return await self._daemon.whole(self._attached(lease, self._daemon.volumes.attach))

    async def _exports(self, lease: Lease, plan: dict[str, Any]) -> dict[str, Any]:
        """What root exports of the lease's mounts, in the same way."""
        if not plan.get("nic"):
            return {}
        return await self._daemon.whole(self._attached(lease, partial(self._daemon.exports.attach, plan=plan)))

    async def _attached(self, lease: Lease, attach: Callable[[Lease], dict[str, Any]]) -> dict[str, Any]:
        async with lease.lock:
            self._daemon.refuse_if_over(lease)
            made: dict[str, Any] = await self._daemon.slow(attach, lease)
        return made

    async def _recorded(self, lease: Lease, slot: Slot | None) -> None:
        async with lease.lock:
            if lease.state is State.STARTING:
                await self._daemon.quick(self._record, lease, slot)

    async def _elected(self, lease: Lease, slot: Slot | None = None) -> None:
        await self._daemon.whole(self._recorded(lease, slot))
        self._daemon.say(lease, "starting")
        self.watch_starter(lease, HOLD_S if slot else self._daemon.parts.hold_timeout_s)
        if lease.root:
            self._daemon.watch_job(lease, lease.root)

    def _record(self, lease: Lease, slot: Slot | None) -> None:
        if slot:
            self._claiming.note(lease, slot)
        # The keeper's own journal begins to matter once the token is out: note it before.
        lease.journal.making("keeper", lease.id)
        lease.save()

    def watch_starter(self, lease: Lease, timeout_s: float) -> None:
        """Elect another if the starter ends, or never brings a keeper."""
        token = lease.token_hash
        loop = asyncio.get_running_loop()
        loop.call_later(timeout_s, self._give_up, lease, token, "no keeper came")
        if lease.starter:
            self._daemon.watch(lease, "starter", lease.starter, lambda: self._give_up(lease, token, "starter ended"))

    def _give_up(self, lease: Lease, token: str, why: str) -> None:
        if lease.state is State.STARTING and lease.token_hash == token:
            if lease.holding:  # its keeper is just being let in, on a busy node
                asyncio.get_running_loop().call_later(1.0, self._give_up, lease, token, why)
                return
            lease.state = State.PREPARED
            self._daemon.say(lease, "unstarted", reason=why)

    def resume(self, lease: Lease) -> None:
        """Go on with a lease found at start that no keeper holds yet."""
        self._images.begin(lease)
        if lease.state is State.STARTING:
            self.watch_starter(lease, self._daemon.parts.hold_timeout_s)
