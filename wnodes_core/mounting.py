"""The mounts of one lease: each served by the first provider that can, journalled, mounted in the guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from wnodes_core.errors import HostError, ImageError, NoProvider, TransientError, WnodesError
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Filesystem, Mount, Process, Vm
from wnodes_core.plan import MOUNT_PORT, Plan
from wnodes_core.ports import Nic
from wnodes_core.processes import read
from wnodes_core.threads import to_its_end

_DEVICES = ("device", "plug")  # what a provider needs whose mounts are devices of the VM

# The disk is known by its serial number, which needs no udev; each folder is one of its own on the disk.
SHOW_SCRATCH = """
set -eu
disk=
left=${WNODES_LOOKS:-300}  # a disk that was just plugged is seen 0.2 s later under TCG
while [ -z "$disk" ]; do
    for sys in /sys/class/block/*; do
        serial=
        if [ -e "$sys/serial" ]; then IFS= read -r serial <"$sys/serial" || :; fi  # there is no newline in it
        if [ "$serial" = scratch ]; then disk=/dev/${sys##*/}; fi
    done
    if [ -n "$disk" ] || [ "$left" -le 0 ]; then break; fi
    left=$((left - 1))
    sleep 0.05
done
: "${disk:?the guest sees no disk of that name}"
on=/run/wnodes/scratch
mkdir -p "$on"
mount -t ext4 -o nosuid,nodev,noatime "$disk" "$on"
n=0
for at in "$@"; do
    n=$((n + 1))
    mkdir -p "$on/$n" "$at"
    chmod 1777 "$on/$n"
    mount --bind "$on/$n" "$at"
done
"""


class Mounts:
    """What the plan's mounts need on the host and in the guest. ``hook`` is pluggy's relay."""

    def __init__(self, plan: Plan, journal: Journal, hook: Any, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._journal = journal
        self._hook = hook
        self._announce = announce
        self.nic: Nic | None = None  # once the VM has one
        self._facts = dict(plan.image.facts)
        self._equipment: dict[int, dict[str, Any]] = {}  # by the mount's number
        self._problems: dict[int, list[WnodesError]] = {}

    def equip(self) -> tuple[Filesystem, ...]:
        """What a VM that is booted must have from its start on for its mounts, made and journalled. Blocks.

        Raises MountDenied. A provider that cannot serve is passed over, as in ``attach``.
        """
        return self._equip(_DEVICES, None)

    @property
    def pluggable(self) -> bool:
        """Whether there is a mount that may be a device which is plugged in."""
        return bool(self._plan.mounts) and needs_of(self._hook, self._plan.storage[0]) in _DEVICES

    async def plug(self, vm: Vm, hypervisor: Process) -> None:
        """Give a running clone the devices for those of its mounts that can be plugged in.

        Raises MountDenied, NoProvider, TransientError.
        """
        if not await asyncio.to_thread(self._hook.wnodes_filesystems_plug, vm=vm, filesystems=()):
            return  # this backend plugs none in: the next in the order serves
        made = await to_its_end(partial(self._equip_clone, hypervisor))
        if made and not await asyncio.to_thread(self._hook.wnodes_filesystems_plug, vm=vm, filesystems=made):
            raise NoProvider("no backend plugs file systems into this clone")

    def _equip_clone(self, hypervisor: Process) -> tuple[Filesystem, ...]:
        try:
            memory = os.open(f"/proc/{hypervisor.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:  # Yama's ptrace_scope of 2 and more
            problem = NoProvider(f"no way to the clone's memory: {error.strerror}")
            self._problems.update({index: [problem] for index in range(len(self._plan.mounts))})
            return ()
        try:
            found = read(hypervisor.pid)
            if found is None or found.started != hypervisor.started:
                raise TransientError("the clone's hypervisor has gone")
            return self._equip(("plug",), memory)
        finally:
            os.close(memory)

    def _equip(self, kinds: Sequence[str], memory: int | None) -> tuple[Filesystem, ...]:
        found = (self._equipped(index, mount, kinds, memory) for index, mount in enumerate(self._plan.mounts))
        return tuple(Filesystem(**each["filesystem"]) for each in found if each)

    def _equipped(self, index: int, mount: Mount, kinds: Sequence[str], memory: int | None) -> dict[str, Any] | None:
        for name in self._plan.storage:
            needs = needs_of(self._hook, name)
            if needs not in _DEVICES:
                return None
            if needs not in kinds:
                continue
            with self._journal.making_it("attachment", f"{name} device of {mount.target}") as made:
                try:
                    found: dict[str, Any] | None = self._hook.wnodes_mount_equip(
                        mount=mount,
                        index=index,
                        folder=self._plan.folder,
                        guest=self._facts,
                        provider=name,
                        memory=memory,
                    )
                except (NoProvider, HostError) as error:
                    self._problems.setdefault(index, []).append(error)
                    continue
                if found:
                    made["attachment"] = found
                    self._equipment[index] = found
                    self._tell(found)
                    return found
        return None

    def _tell(self, attachment: dict[str, Any]) -> None:
        if attachment.get("notice"):
            self._announce(attachment["notice"])

    async def attach(self, channel: GuestChannel) -> None:
        """Mount all of them, scratch first, then parents first, in a guest that answers.

        Raises WnodesError; what was made until then is in the journal.
        """
        if self._plan.scratch:
            argv = ["sh", "-c", SHOW_SCRATCH, "scratch", *self._plan.scratch_at]
            done = await channel.run(argv)
            if done.code:
                raise ImageError(f"scratch: {done.stderr.decode(errors='replace').strip()[-500:]}")
        left = list(enumerate(self._plan.mounts))
        while left:
            # Those that lie below none of the others go at the same time: the guest's side is most of it.
            now = [(i, m) for i, m in left if not any(_below(m, other) for _, other in left)]
            left = [each for each in left if each not in now]
            ends = await asyncio.gather(*(self._mount(channel, i, m) for i, m in now), return_exceptions=True)
            for problem in ends:
                if isinstance(problem, BaseException):
                    raise problem

    async def _mount(self, channel: GuestChannel, index: int, mount: Mount) -> None:
        socket_path = self._plan.mount_socket(index)
        guest = {**channel.facts, "port": MOUNT_PORT.format(index), **self._made_for(index)}
        with self._journal.making_it("attachment", mount.target, socket=socket_path) as made:
            attachment = self._attachment(index, mount, socket_path, guest)
            made["attachment"] = {key: value for key, value in attachment.items() if key != "guest"}
        self._tell(attachment)
        for step in attachment["guest"]:
            done = await channel.run(**step)
            if done.code:
                raise TransientError(f"mount {mount}: {done.stderr.decode(errors='replace').strip()[-500:]}")

    def _made_for(self, index: int) -> dict[str, Any]:
        nic = self.nic.to_dict() if self.nic else None
        return {"nic": nic, "equipped": self._equipment.get(index), "export": self._plan.exports.get(str(index))}

    def _attachment(self, index: int, mount: Mount, socket_path: str, guest: dict[str, Any]) -> dict[str, Any]:
        """The first provider in the site's order that can serve the mount.

        Raises NoProvider, or HostError if one of them found this host wanting.
        """
        found = self._problems.get(index, [])
        problems = [error.message for error in found]
        sick = next((error for error in found if isinstance(error, HostError)), None)
        for name in self._plan.storage:
            try:
                made: dict[str, Any] | None = self._hook.wnodes_mount_attach(
                    mount=mount, socket_path=socket_path, guest=guest, provider=name
                )
            except (NoProvider, HostError) as error:
                problems.append(f"{name}: {error.message}")
                sick = sick or (error if isinstance(error, HostError) else None)
                continue
            if made is not None:
                return made
            problems.append(f"{name}: there is no such provider")
        if sick:
            raise sick
        raise NoProvider(f"mount {mount}: nothing can serve it to this guest: {'; '.join(problems)}")


def needs_of(hook: Any, provider: str) -> str:
    """What a storage provider needs of the VM: '', ``device``, ``plug``, … (``wnodes_mount_usable``)."""
    found = {each["provider"]: each.get("needs", "") for each in reversed(hook.wnodes_mount_usable())}
    needs: str = found.get(provider, "")
    return needs


def needs_device(hook: Any, storage: Sequence[str], mounts: Sequence[Mount]) -> bool:
    """Whether mounts that are served in this order want something in the VM that a clone cannot have."""
    return bool(mounts) and needs_of(hook, storage[0]) == "device"


def _below(mount: Mount, other: Mount) -> bool:
    return mount.target.startswith(other.target.rstrip("/") + "/")


def undo(resource: Resource, hook: Any) -> None:
    """End the gateway of one attachment; a mount whose gateway never started needs nothing."""
    if "attachment" in resource.data:
        hook.wnodes_mount_detach(attachment=resource.data["attachment"])
