"""Giving a running VM its NIC (the port where the keeper makes it, the plug, the guest's addresses), and a disk.

After the guest answers and not before, because a clone's template has no NIC: its MAC could not change.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from wnodes_core.errors import NoProvider, TransientError
from wnodes_core.guest import bundle
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Disk
from wnodes_core.plan import Plan
from wnodes_core.ports import Nic, Port

APPEARS_S = 15.0  # for the guest's bus and driver; 0.2 s under TCG
_LOOK_S = 0.02


async def plug(plan: Plan, channel: GuestChannel, hook: Any, journal: Journal) -> Nic | None:
    """Bring the VM into the network that its plan names: its NIC, None for one that names none.

    Raises NoProvider, TransientError and what plug-ins raise.
    """
    if plan.port is None:
        return None
    nic = plan.nic if plan.nic else await asyncio.to_thread(_attach, plan.port, hook, journal)
    if not await asyncio.to_thread(hook.wnodes_vm_plug, vm=plan.vm(()), nic=nic):
        raise NoProvider(f"network {plan.port.network!r}: this backend plugs no NIC of kind {nic.kind!r}")
    if nic.mac:  # a device that is no NIC needs no address
        await settle(channel, nic, plan.port.network)
    return nic


def _attach(port: Port, hook: Any, journal: Journal) -> Nic:
    with journal.making_it("port", port.device or port.network, **port.to_dict()):
        made: Nic | None = hook.wnodes_port_attach(port=port)
        if made is None:
            raise NoProvider(
                f"network {port.network!r}: no plug-in of the job's user makes a {port.kind!r} port",
                hint="bridges and devices want wnodesd",
            )
    return made


def plug_disk(disk: Disk, plug: Callable[..., Any]) -> None:
    """Plug a disk into a running clone; ``plug(disk=…, fd=…)`` does it. Blocks.

    It is opened here: the QEMU of a pooled clone is another user than the disk's. Raises NoProvider,
    TransientError.
    """
    try:
        fd = os.open(disk.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise TransientError(f"disk {disk.path}: {error.strerror}") from error
    try:
        if not plug(disk=disk, fd=fd):
            raise NoProvider("no backend plugs a disk into this clone")
    finally:
        os.close(fd)


def undo_port(resource: Resource, hook: Any) -> None:
    """Remove a port that a keeper made."""
    hook.wnodes_port_detach(port=Port.from_dict(resource.data))


async def settle(channel: GuestChannel, nic: Nic, network: str) -> None:
    """Wait until the guest sees the NIC and has set it up. Raises TransientError, ChannelLost."""
    deadline = time.monotonic() + APPEARS_S
    loaded: set[str] = set()
    facts, modules = nic.to_dict(), bundle.network_modules()
    while "name" not in (told := await channel.request("network", modules=modules, **facts)):
        modules = []
        # The guest's own words: bounded, and only arguments of a program in the guest itself.
        missing = [str(alias)[:200] for alias in told.get("missing", [])[:16] if alias not in loaded]
        if missing:
            loaded.update(missing)
            await channel.run(["modprobe", "-q", "-a", "--", *missing])
        if time.monotonic() > deadline:
            raise TransientError(f"network {network!r}: the guest shows no NIC {nic.mac} after {APPEARS_S:g} s")
        await asyncio.sleep(_LOOK_S)
