"""Raising one lease's VM and taking it down again: the only orchestrator.

A VM is cloned from its template where the plan names one, else booted; after a clone that came to
nothing it is booted. Each step is one function, journalled before its effect and timed into the
trace; ``undo_one`` is its mirror and runs in any process with the user's rights, after any crash.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from wnodes_core.errors import NoProvider, RequestError, WnodesError
from wnodes_core.growth import grown
from wnodes_core.guest import bundle, identity, strangers
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.journal import Journal
from wnodes_core.model import Disk, Process, Start, Template, Trace, Vm
from wnodes_core.mounting import Mounts
from wnodes_core.plan import Plan
from wnodes_core.plugging import plug, plug_disk
from wnodes_core.pool.pooled import Pooled
from wnodes_core.threads import to_its_end
from wnodes_core.undoing import undo_one
from wnodes_core.watch import Watch

log = logging.getLogger(__name__)

Announce = Callable[[str], None]
Starter = Callable[[Vm], Process]

CLONE_TIMEOUT_S = 15.0  # a clone that does not answer by then is given up: far less than a boot takes


@dataclass
class Running:
    """A VM that answers: its process, its channel, what was attached."""

    vm: Vm
    process: Process
    channel: GuestChannel


class Lifecycle:
    """One lease's way up and down. ``hook`` is pluggy's relay, ``announce`` tells the user."""

    def __init__(
        self, plan: Plan, journal: Journal, hook: Any, trace: Trace, announce: Announce, pooled: Pooled | None = None
    ) -> None:
        self.plan = plan
        self.pooled = pooled
        self.journal = journal
        self.hook = hook
        self.trace = trace
        self.announce = announce
        self.watch = Watch(plan.console)
        self._mounts = Mounts(plan, journal, hook, announce)
        self._agent = strangers.kind_of(plan.image.facts)

    async def start(self) -> Running:
        """Bring the VM up, mounts and user included.

        Raises WnodesError; what was made until then is in the journal and for ``stop`` to undo.
        """
        began = time.monotonic()
        while True:
            raising = self._way_up()
            if self.trace.start.kind == "cold":
                return await self._furnished(raising)
            try:
                return await self._furnished(raising)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a clone, a boot may still do
                # What fails late is a mount that hangs: a boot would only make the job wait twice for it.
                if isinstance(error, RequestError) or time.monotonic() - began > 2 * CLONE_TIMEOUT_S:
                    raise
                await self._fall_back(error)

    def _way_up(self) -> Coroutine[Any, Any, Running]:
        """How to raise the VM, the quickest that is left."""
        template, fallback = self.plan.template, self.trace.start.fallback or self.plan.fallback
        if template is None:
            self.trace.start = Start("cold", fallback=fallback)
            return self.boot(self._vm_start)
        kind = "pool" if self.pooled else "warm"
        self.trace.start = Start(kind, template.way, template.id, fallback)
        return self._take_over(self.pooled) if self.pooled else self.clone(template)

    async def boot(self, start: Starter) -> Running:
        """A guest that was booted, with neither the job's user nor its mounts; ``start`` starts its hypervisor."""
        vm = replace(self._vm(), filesystems=await to_its_end(self._mounts.equip))
        with self._timed("overlay"):
            self._create_disk(self.plan.overlay)
            if self._agent == "cloud-init":
                strangers.make_seed(self.plan.folder, self.plan.seed.path, self.plan.host_name)
        if self.plan.scratch:
            with self._timed("scratch"):
                self._create_disk(self.plan.scratch)
        with self._timed("define"):
            process = await self._started(vm, start)
        self.announce(f"booting {self.plan.image.name} ({vm.cpus} cpus, {vm.memory_mib} MiB, {vm.accel})")
        with self._timed("boot"):
            channel = await self._while_alive(self._connect())
        return Running(vm, process, channel)

    def stop(self) -> list[Exception]:
        """Undo all that is open in the journal; goes on after failures and returns them."""
        with self._timed("teardown"):
            errors = self.journal.undo(lambda resource: undo_one(resource, self.hook))
            if self.pooled:
                try:
                    self.pooled.end()
                except WnodesError as error:
                    errors.append(error)
            return errors

    def pause(self, paused: bool) -> None:
        """Stop or continue the VM. Blocks."""
        if self.pooled:
            self.pooled.pause(paused)
        else:
            self.hook.wnodes_vm_pause(vm=self.plan.vm(()), paused=paused)

    async def _take_over(self, pooled: Pooled) -> Running:
        """A clone that woke long ago, and proved then to be nobody's double."""
        vm = self._vm()
        with self._timed("claim"):
            channel = await pooled.resume(vm)
        self.watch.process = pooled.process
        return Running(vm, pooled.process, channel)

    async def clone(self, template: Template) -> Running:
        """A guest that woke as a copy of the template's, proved to be nobody's double."""
        vm = self._vm()
        with self._timed("overlay"):
            self._create_disk(self.plan.overlay)
        asked = identity.ask(self.plan.host_name)
        # It listens before QEMU starts and connects: the guest never sees its port hang up.
        waking = asyncio.ensure_future(
            GuestChannel.resume(self.plan.agent_socket, timeout_s=CLONE_TIMEOUT_S, wake=asked)
        )
        try:
            await asyncio.sleep(0)
            with self._timed("clone"):
                process = await self._started(vm, lambda vm: self._vm_clone(vm, template))
            with self._timed("wake"):
                channel, told = await self.watch.while_alive(waking, CLONE_TIMEOUT_S)
        except BaseException:
            waking.cancel()
            raise
        try:
            identity.check(template.identity, asked, told)
        except BaseException:
            channel.close()
            raise
        return Running(vm, process, channel)

    async def _fall_back(self, error: Exception) -> None:
        """Undo a clone that came to nothing, so that a boot finds the place empty.

        Raises ``error`` if something of the clone is left.
        """
        log.warning("no clone: %s", error, exc_info=not isinstance(error, WnodesError))
        left = await asyncio.to_thread(self.stop)
        if left:
            raise error
        self.watch.process = None
        self.trace.start = replace(self.trace.start, fallback=type(error).__name__)
        text = error.message if isinstance(error, WnodesError) else f"{type(error).__name__}: {error}"
        what, instead = ("pooled VM", "cloning") if self.pooled else ("clone", "booting")
        self.announce(f"no {what}: {text.splitlines()[0][:200]}; {instead} instead")
        self.plan = replace(self.plan, slot="") if self.pooled else self.plan.booted
        self.pooled = None
        self._mounts = Mounts(self.plan, self.journal, self.hook, self.announce)

    async def _furnished(self, raising: Any) -> Running:
        """The VM with the job's user, network and mounts."""
        running: Running = await raising
        try:
            if self.plan.template and not self.pooled and self._mounts.pluggable:
                with self._timed("plug"):  # first: the guest's kernel looks at it beside all else
                    await self._while_alive(self._mounts.plug(running.vm, running.process))
            with self._timed("agent"):
                await self._while_alive(self._set_up(running.channel))
            if self.plan.template and self.plan.scratch:
                with self._timed("scratch"):
                    await self._while_alive(self._plug_scratch(running.vm, self.plan.scratch))
            if self.plan.port:
                with self._timed("network"):
                    plugged = plug(self.plan, running.channel, self.hook, self.journal)
                    self._mounts.nic = await self._while_alive(plugged)
            with self._timed("mount"):
                await self._while_alive(self._mounts.attach(running.channel))
            if self.plan.template:
                with self._timed("memory"):
                    await self._while_alive(grown(running.channel, self.plan))
        except BaseException:
            running.channel.close()
            raise
        return running

    def _vm(self) -> Vm:
        return self.plan.vm(sorted(os.sched_getaffinity(0)))

    def _create_disk(self, disk: Disk) -> None:
        with self.journal.making_it("disk", disk.path, **asdict(disk)):
            if not self.hook.wnodes_disk_create(disk=disk):
                raise NoProvider(f"no plug-in makes a {disk.format} disk on {disk.base!r}")

    async def _plug_scratch(self, vm: Vm, disk: Disk) -> None:
        """Make a clone's scratch and plug it in, for its template has none."""
        self._create_disk(disk)
        plug = self.pooled.plug if self.pooled else partial(self.hook.wnodes_disk_plug, vm=vm)
        await asyncio.to_thread(plug_disk, disk, plug)

    async def _started(self, vm: Vm, start: Starter) -> Process:
        self.watch.process = await to_its_end(lambda: self._start(vm, start))
        return self.watch.process

    def _start(self, vm: Vm, start: Starter) -> Process:
        with self.journal.making_it("vm", vm.name, **asdict(vm)) as facts:
            process = start(vm)
            facts.update(pid=process.pid, started=process.started)
        return process

    def _vm_start(self, vm: Vm) -> Process:
        process: Process = self.hook.wnodes_vm_start(vm=vm)
        return process

    def _vm_clone(self, vm: Vm, template: Template) -> Process:
        process: Process | None = self.hook.wnodes_vm_clone(vm=vm, template=template)
        if process is None:
            raise NoProvider(f"no backend clones a {template.way!r} template")
        return process

    async def _connect(self) -> GuestChannel:
        connecting = GuestChannel.connect(self.plan.agent_socket, timeout_s=self.plan.boot_timeout_s)
        if self._agent != "qemu-ga":
            return await connecting
        channel = asyncio.ensure_future(connecting)
        asking = asyncio.ensure_future(strangers.ask_guest_agent(self._ask_agent))
        try:
            await asyncio.wait({channel, asking}, return_when=asyncio.FIRST_EXCEPTION)
            if asking.done():
                asking.result()
            return await channel
        finally:
            for task in (channel, asking):
                task.cancel()

    def _ask_agent(self, command: str, timeout_s: int) -> str | None:
        answer: str | None = self.hook.wnodes_vm_ask_agent(vm=self.plan.vm(()), command=command, timeout_s=timeout_s)
        return answer

    async def _set_up(self, channel: GuestChannel) -> None:
        user = self.plan.user
        commands = [*self.plan.host_commands, *(["wnodes-run-as"] if self.plan.run_as else [])]
        await channel.request(
            "setup",
            host_name=self.plan.host_name,
            clock=time.time(),
            user={"name": user.name, "uid": user.uid, "gid": user.gid, "home": user.home},
            groups=[{"name": name, "gid": gid} for name, gid in user.groups.items()],
            shim=bundle.read("guest_shim.py") if commands else "",
            commands=commands,
        )

    async def _while_alive(self, wanted: Any) -> Any:
        return await self.watch.while_alive(wanted, self.plan.boot_timeout_s)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.trace.add(name, time.monotonic() - began)
