"""wnodesd's pool: filled in the background, given out one by one, let go when the node's memory is short."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease
from wnodes_core.agent.slots import Slot, Slots, uid_of
from wnodes_core.agent.warm import Warm, available_mib
from wnodes_core.errors import WnodesError
from wnodes_core.journal import Resource
from wnodes_core.model import Image, ImageRef, Job, Template
from wnodes_core.plan import Plan, User
from wnodes_core.settings.values import numbers

KIND = "slot"  # in a lease's journal: a VM of the pool's, by its slot's name
_BACK_OFF_S = (5.0, 600.0)
_QUIET_S = 1.0  # after a claim: the job's start comes before its slot's refilling


@dataclass(frozen=True)
class _Stock:
    """What a rule's clones are made of."""

    entry: Any
    image: Image
    template: Template
    accel: str


class Pool:
    """The idle clones of this node, as the settings of the moment want them."""

    def __init__(self, daemon: Daemon, warm: Warm) -> None:
        self._daemon = daemon
        self._warm = warm
        self._slots = Slots(daemon.settings.state_dir, daemon.parts.store)
        self.idle: dict[str, Slot] = {}  # the oldest first
        self._busy: set[int] = set()  # uids of slots that are being made or ended
        self._stuck: set[int] = set()  # uids of slots that could not be ended; they are tried again
        self._wanted = asyncio.Event()
        self._claimed_at = 0.0
        self._failures: dict[str, tuple[int, float]] = {}
        daemon.undoer.end_slot = self.undo

    async def run(self) -> None:
        """Sweep what an earlier wnodesd left; then keep the pool full until cancelled."""
        assert self._daemon.accel is not None
        await asyncio.wait({self._daemon.accel})
        while True:
            self._wanted.clear()
            try:
                await self._round()
            except Exception:  # noqa: BLE001 - a net: the pool must live to be filled again
                log.exception("pool", extra={"event": "pool"})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), self._daemon.settings.daemon.sweep_interval_s)

    # -- keeping it full --------------------------------------------------------------------------

    async def _round(self) -> None:
        warm = self._daemon.settings.warm
        await self._sweep()
        await self._shrink(warm.pool_min_free_mib)
        kept: set[str] = set()
        for rule in warm.pool:
            key = f"{rule.image} {rule.cpus}"
            if time.monotonic() < self._failures.get(key, (0, 0.0))[1]:
                kept |= set(self.idle)  # what there is of it is as good as it was
                continue
            try:
                stock = await self._stock(rule)
                kept |= await self._fill(stock, rule.count, warm) if stock else set()
                self._failures.pop(key, None)
            except (WnodesError, OSError) as error:
                tries = self._failures.get(key, (0, 0.0))[0] + 1
                self._failures[key] = tries, time.monotonic() + min(_BACK_OFF_S[1], _BACK_OFF_S[0] * 2**tries)
                log.warning("pool of %s: %s", rule.image, error, extra={"event": "pool"})
                kept |= set(self.idle)
        for name in set(self.idle) - kept:  # of a rule, an image, a QEMU that is no more
            await self._end(name, "no longer wanted")

    async def _stock(self, rule: Any) -> _Stock | None:
        """The template for a rule, built if it may be; None where there is none yet."""
        daemon, store = self._daemon, self._daemon.parts.store
        assert daemon.accel is not None
        accel = await asyncio.shield(daemon.accel)
        entry = await daemon.quick(store.resolve, ImageRef.parse(rule.image))
        image = await daemon.quick(store.image, entry)
        if image is None:
            deadline = time.monotonic() + daemon.settings.images.fetch_timeout_s
            image = await daemon.fetching(store.ensure, entry, lambda done, total: None, deadline)
        template = await self._warm.of_pool(image, accel, rule.cpus)
        # Only a mapped clone can change hands: libvirt's driver would go on writing into the slot's folder.
        return _Stock(entry, image, template, accel) if template and template.memory else None

    async def _fill(self, stock: _Stock, count: int, warm: Any) -> set[str]:
        """Make what is missing, one at a time; the names of those that are right."""
        mine = [name for name, slot in self.idle.items() if slot.template.id == stock.template.id][:count]
        while len(mine) < count:
            if available_mib() - stock.template.shape.memory_mib < warm.pool_min_free_mib:
                log.info("pool: the node's memory is needed", extra={"event": "pool"})
                break
            await asyncio.sleep(max(0.0, self._claimed_at + _QUIET_S - time.monotonic()))
            uid = self._free_uid(numbers(warm.pool_uids))
            if not uid:
                log.info("pool: no uid of warm.pool_uids (%s) is free", warm.pool_uids, extra={"event": "pool"})
                break
            mine.append(await self._make(stock, uid))
            mine = [name for name in mine if name in self.idle]
        return set(mine)

    async def _make(self, stock: _Stock, uid: int) -> str:
        daemon, template = self._daemon, stock.template
        memory = await self._warm.memory_of(template)
        plan = Plan(
            lease="",
            folder="",
            job=Job("pool", "", "", uid, uid, ""),
            image=stock.image,
            user=User("", uid, uid, "/"),
            accel=stock.accel,
            cpus=template.shape.cpus,
            memory_mib=template.shape.memory_mib,
            mounts=(),
            boot_timeout_s=daemon.settings.vm.boot_timeout_s,
            template=replace(template, memory=""),
        )
        self._busy.add(uid)
        began = time.monotonic()
        memory = os.dup(memory)  # however long the clone takes, it is open until then
        try:
            disabled = tuple(daemon.settings.plugins.disabled)
            slot: Slot = await daemon.slow(self._slots.make, stock.entry, plan, uid, memory, disabled)
        finally:
            os.close(memory)
            self._busy.discard(uid)
        self.idle[slot.name] = slot
        slot.control.setblocking(False)
        asyncio.get_running_loop().add_reader(slot.control, self._lost, slot.name)
        self._reap(slot)
        seconds = round(time.monotonic() - began, 3)
        log.info("slot %s waits", slot.name, extra={"event": "pool", "slot": slot.name, "seconds": seconds})
        return slot.name

    def _reap(self, slot: Slot) -> None:
        """Collect its keeper whenever that ends, a lease's by then perhaps."""
        loop, fd = asyncio.get_running_loop(), os.pidfd_open(slot.keeper.pid)

        def ended() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            slot.child.poll()

        loop.add_reader(fd, ended)

    def _free_uid(self, uids: range) -> int:
        used = self._used_uids() | self._stuck
        return next((uid for uid in uids if uid not in used), 0)

    def _used_uids(self) -> set[int]:
        names = [each.name for lease in self._daemon.leases.values() for each in slots_of(lease)]
        return {slot.uid for slot in self.idle.values()} | self._busy | {uid_of(name) for name in names}

    async def _shrink(self, least_mib: int) -> None:
        while self.idle and available_mib() < least_mib:
            await self._end(next(reversed(self.idle)), "the node's memory is needed")

    def _lost(self, name: str) -> None:
        """A keeper that waits says nothing: what is to be heard is its end."""
        self._daemon.background(self._end(name, "its keeper or its VM has ended"), f"end of slot {name}")

    async def _end(self, name: str, why: str) -> None:
        slot = self.idle.pop(name, None)
        if slot is None:
            return
        log.info("slot %s: %s", name, why, extra={"event": "pool", "slot": name})
        self._busy.add(slot.uid)
        self._let_go(slot)
        await self._finish(slot)

    async def _finish(self, slot: Slot) -> None:
        try:
            slot.control.close()
            with suppress(Exception):  # whatever its keeper does, the rest is ended by uid
                await self._daemon.slow(_stop, slot)
            await self._daemon.slow(self._slots.undo, slot.name, slot.template.folder)
        finally:
            self._busy.discard(slot.uid)
            self._wanted.set()

    def _let_go(self, slot: Slot) -> None:
        asyncio.get_running_loop().remove_reader(slot.control)
        slot.control.close()

    async def _sweep(self) -> None:
        """Undo slots that are nobody's: of keepers that ended with their wnodesd, or whose end failed before."""
        for name in await self._daemon.quick(self._slots.names):
            uid = uid_of(name)
            if uid in self._used_uids():
                continue
            try:
                await self._daemon.slow(self._slots.undo, name)
                self._stuck.discard(uid)
            except (WnodesError, OSError) as error:
                self._stuck.add(uid)
                log.error("slot %s: %s", name, error, extra={"event": "pool"})

    # -- giving out -------------------------------------------------------------------------------

    def take(self, lease: Lease, template: dict[str, Any] | None, mounts: int) -> Slot | None:
        """A slot for a VM that is to be cloned from this very template; None if there is none, or one has failed."""
        # A clone that waits has no network card; a keeper that waited never serves root.
        if template is None or lease.no_pool or not lease.job.uid or lease.request.network:
            return None
        fits = (slot for slot in self.idle.values() if slot.template.id == template["id"])
        slot = next((slot for slot in fits if mounts <= slot.template.mount_ports), None)
        if slot:
            del self.idle[slot.name]
            self._busy.add(slot.uid)  # until a journal names it: see noted()
            asyncio.get_running_loop().remove_reader(slot.control)
            self._claimed_at = time.monotonic()
            self._wanted.set()
        return slot

    def noted(self, lease: Lease, slot: Slot) -> None:
        """A taken slot's claim was noted, or came to nothing: then it is ended."""
        if any(each.name == slot.name for each in slots_of(lease)):
            self._busy.discard(slot.uid)
        else:
            self._daemon.background(self._finish(slot), f"end of slot {slot.name}")

    def undo(self, resource: Resource) -> None:
        """End a lease's slot; idempotent, blocks. Raises WnodesError, OSError."""
        self._slots.undo(resource.name, str(resource.data.get("template", "")))


def slots_of(lease: Lease) -> list[Resource]:
    """The slots that a lease has claimed, as its journal says."""
    return [each for each in lease.journal.open_resources if each.kind == KIND]


def _stop(slot: Slot) -> None:
    slot.child.kill()
    slot.child.wait(10)
