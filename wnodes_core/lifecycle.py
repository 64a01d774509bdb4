"""Raising one lease's VM and taking it down again: the only orchestrator.

Each step is one function, journalled before its effect and timed into the trace; ``undo_one``
is its mirror and runs in any process with the user's rights, after any crash.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from wnodes_core import processes
from wnodes_core.errors import BootTimeout, ChannelLost, GuestPanic, NoProvider, TransientError, WnodesError
from wnodes_core.files import read_tail
from wnodes_core.guest import bundle, strangers
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Disk, Mount, Process, Trace, Vm
from wnodes_core.plan import MOUNT_PORT, Plan, vm_from_dict

Announce = Callable[[str], None]


@dataclass
class Running:
    """A VM that answers: its process, its channel, what was attached."""

    vm: Vm
    process: Process
    channel: GuestChannel


class Lifecycle:
    """One lease's way up and down. ``hook`` is pluggy's relay, ``announce`` tells the user."""

    def __init__(self, plan: Plan, journal: Journal, hook: Any, trace: Trace, announce: Announce) -> None:
        self.plan = plan
        self.journal = journal
        self.hook = hook
        self.trace = trace
        self.announce = announce
        self.process: Process | None = None
        self._agent = strangers.kind_of(plan.image.facts)

    async def start(self) -> Running:
        """Bring the VM up, mounts and user included.

        Raises WnodesError; what was made until then is in the journal and for ``stop`` to undo.
        """
        vm = self.plan.vm(sorted(os.sched_getaffinity(0)))
        with self._timed("overlay"):
            self._create_disk(self.plan.overlay)
            if self._agent == "cloud-init":
                strangers.make_seed(self.plan.folder, self.plan.seed.path, self.plan.host_name)
        with self._timed("define"):
            self.process = await _to_its_end(self._start_vm, vm)
        self.announce(f"booting {self.plan.image.name} ({vm.cpus} cpus, {vm.memory_mib} MiB, {vm.accel})")
        with self._timed("boot"):
            channel = await self._while_alive(self._connect())
        try:
            with self._timed("agent"):
                await self._while_alive(self._set_up(channel))
            with self._timed("mount"):
                await self._while_alive(self._mount_all(channel))
        except BaseException:
            channel.close()
            raise
        return Running(vm, self.process, channel)

    def stop(self) -> list[Exception]:
        """Undo all that is open in the journal; goes on after failures and returns them."""
        with self._timed("teardown"):
            return self.journal.undo(lambda resource: undo_one(resource, self.hook))

    def _create_disk(self, disk: Disk) -> None:
        with self.journal.making_it("disk", disk.path, **asdict(disk)):
            if not self.hook.wnodes_disk_create(disk=disk):
                raise NoProvider(f"no plug-in makes a {disk.format} disk on {disk.base!r}")

    def _start_vm(self, vm: Vm) -> Process:
        with self.journal.making_it("vm", vm.name, **asdict(vm)) as facts:
            process: Process = self.hook.wnodes_vm_start(vm=vm)
            facts.update(pid=process.pid, started=process.started)
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
        commands = list(self.plan.host_commands)
        await channel.request(
            "setup",
            host_name=self.plan.host_name,
            clock=time.time(),
            user={"name": user.name, "uid": user.uid, "gid": user.gid, "home": user.home},
            groups=[{"name": name, "gid": gid} for name, gid in user.groups.items()],
            shim=bundle.read("guest_shim.py") if commands else "",
            commands=commands,
        )

    async def _mount_all(self, channel: GuestChannel) -> None:
        for index, mount in enumerate(self.plan.mounts):
            await self._mount(channel, index, mount)

    async def _mount(self, channel: GuestChannel, index: int, mount: Mount) -> None:
        socket_path = self.plan.mount_socket(index)
        guest = {**channel.facts, "port": MOUNT_PORT.format(index)}
        with self.journal.making_it("attachment", mount.target, socket=socket_path) as made:
            attachment = self.hook.wnodes_mount_attach(mount=mount, socket_path=socket_path, guest=guest)
            if attachment is None:
                raise NoProvider(f"mount {mount}: no storage plug-in can serve it to this guest")
            made["attachment"] = {key: value for key, value in attachment.items() if key != "guest"}
        if attachment.get("notice"):
            self.announce(attachment["notice"])
        for step in attachment["guest"]:
            done = await channel.run(**step)
            if done.code:
                raise TransientError(f"mount {mount}: {done.stderr.decode(errors='replace').strip()[-500:]}")

    async def _while_alive(self, wanted: Any) -> Any:
        """Await something of the guest, but notice at once if the VM ends meanwhile."""
        task = asyncio.ensure_future(wanted)
        death = asyncio.ensure_future(self.ended())
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED, timeout=self.plan.boot_timeout_s)
            if task.done():
                return task.result()
            if death.done():
                raise GuestPanic(f"the VM ended while it started{self.console_tail()}")
            raise BootTimeout(f"the guest did not answer within {self.plan.boot_timeout_s:g} s{self.console_tail()}")
        except (ChannelLost, ConnectionError) as error:
            # A closed channel is what a dying QEMU shows first: give its end a moment to be seen.
            await asyncio.wait({death}, timeout=2)
            if death.done():
                raise GuestPanic(f"the VM ended while it started{self.console_tail()}") from error
            if isinstance(error, ChannelLost):
                raise
            raise ChannelLost(f"the VM's ports do not answer: {error}") from error
        finally:
            for each in (task, death):
                each.cancel()
            await asyncio.gather(task, death, return_exceptions=True)

    async def ended(self) -> None:
        """Return when the VM's process is gone."""
        fd = processes.open_pidfd(self.process) if self.process else None
        if fd is None:
            return
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        loop.add_reader(fd, _settle, gone)
        try:
            await gone
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def console_tail(self) -> str:
        """The guest's last words for an error message, without control characters, or ''."""
        text = read_tail(self.plan.console, 8000)
        said = "".join(c for c in text if c.isprintable() or c == "\n").strip().splitlines()
        # A panic's own line says why; the kernel writes a page of addresses after it.
        panic = next((number for number, line in enumerate(said) if "Kernel panic" in line), -8)
        lines = "\n".join(f"  console: {line}" for line in said[panic:][:8])
        return f"; its console ended with\n{lines}" if lines else " and wrote nothing to its console"

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.trace.add(name, time.monotonic() - began)


async def _to_its_end(work: Callable[[Vm], Process], vm: Vm) -> Process:
    """Run ``work`` in a thread; a cancelled caller still waits for it.

    A VM whose start nobody awaits any more would come up behind the back of the undo.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work, vm))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait({thread})
        raise


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def undo_one(resource: Resource, hook: Any) -> None:
    """Undo one open resource of a journal; "already gone" is fine.

    Raises WnodesError or OSError if it is still there afterwards.
    """
    undo = _UNDO.get(resource.kind)
    if undo is None:
        raise WnodesError(f"journal names a {resource.kind!r}, which nothing here can undo")
    undo(resource, hook)


def _undo_vm(resource: Resource, hook: Any) -> None:
    facts = {key: value for key, value in resource.data.items() if key not in ("pid", "started")}
    if not hook.wnodes_vm_stop(vm=vm_from_dict(facts)):
        raise WnodesError(f"VM {resource.name} is still there")


def _undo_disk(resource: Resource, hook: Any) -> None:
    hook.wnodes_disk_delete(disk=Disk(**resource.data))


def _undo_attachment(resource: Resource, hook: Any) -> None:
    if "attachment" in resource.data:
        hook.wnodes_mount_detach(attachment=resource.data["attachment"])


_UNDO: dict[str, Callable[[Resource, Any], None]] = {
    "vm": _undo_vm,
    "disk": _undo_disk,
    "attachment": _undo_attachment,
}
