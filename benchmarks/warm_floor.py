"""A part of bench_warm.py: QEMU alone on a template's state, with no launcher, keeper or libvirt.

usage: warm_floor.py floor|crowd TEMPLATES IMAGE-DIGEST COUNT FOLDER
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wnodes_core.backends.libvirt import clone, plugin
from wnodes_core.guest import identity
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.images.disks import wnodes_disk_create
from wnodes_core.model import Channel, Disk, Template, Vm
from wnodes_core.templates import Shelf

CROWD_MIB = 768


@dataclass
class Awake:
    """A clone that runs."""

    vm: Vm
    pid: int
    channel: GuestChannel
    restore: float
    channel_s: float


async def start(template: Template, folder: Path, number: int, memory_mib: int, *, mounts: bool = False) -> Awake:
    """QEMU started, state loaded, guest woken and one command run, each timed; with sockets for its mounts if asked."""
    place = folder / str(number)
    place.mkdir(parents=True)
    base = template.disks[0]
    overlay = Disk(
        str(place / "overlay.qcow2"), "qcow2", base.path, base.format, False, "root", base.base, base.base_format
    )
    wnodes_disk_create(disk=overlay)
    where = f"{place}/m{{}}" if mounts else ""
    ports = tuple(Channel(f"org.wnodes.mount.{n}", where.format(n)) for n in range(template.mount_ports))
    vm = Vm(
        name=f"wnodes-floor-{os.getpid()}-{number}", folder=str(place), cpus=template.shape.cpus, memory_mib=memory_mib,
        accel=template.accel, disks=(overlay, *template.disks[1:]), console=str(place / "console.log"),
        channels=(Channel("org.wnodes.agent.0", str(place / "agent.sock")), *ports, *_qga(template, place)),
        most_mib=template.shape.most_mib,
    )  # fmt: skip
    asked = identity.ask(f"floor-{number}")
    waking = asyncio.ensure_future(GuestChannel.resume(vm.channels[0].path, timeout_s=60, wake=asked))
    await asyncio.sleep(0)
    began = time.perf_counter()
    process = await asyncio.to_thread(clone.start, vm, template)
    loaded = time.perf_counter()
    channel, told = await waking
    identity.check(template.identity, asked, told)
    done = await channel.run(["true"])
    assert done.code == 0
    return Awake(vm, process.pid, channel, loaded - began, time.perf_counter() - loaded)


def _qga(template: Template, place: Path) -> tuple[Channel, ...]:
    saved = (Path(template.folder) / template.files["argv"]).read_text()
    return (Channel("org.qemu.guest_agent.0", str(place / "qga.sock")),) if "org.qemu.guest_agent.0" in saved else ()


def private_mib(pid: int) -> float:
    """What this process alone holds in memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


async def floor(template: Template, folder: Path, count: int) -> None:
    """One after the other, each ended before the next."""
    for number in range(count):
        awake = await start(template, folder, number, template.shape.memory_mib)
        print(json.dumps({"restore": awake.restore, "channel": awake.channel_s}), flush=True)
        awake.channel.close()
        plugin.wnodes_vm_stop(vm=awake.vm)


async def crowd(template: Template, folder: Path, count: int) -> None:
    """All alive at once; what each took, and what each holds when the last has started."""
    clones: list[Awake] = []
    try:
        for number in range(count):
            clones.append(await start(template, folder, number, CROWD_MIB))
        await asyncio.sleep(2)
        for each in clones:
            await each.channel.request("ping")
            facts: dict[str, Any] = {"seconds": each.restore + each.channel_s, "private_mib": private_mib(each.pid)}
            print(json.dumps(facts), flush=True)
    finally:
        for each in clones:
            plugin.wnodes_vm_stop(vm=replace(each.vm))


def main() -> None:
    """Command line."""
    what, templates, digest, count, where = sys.argv[1:]
    template = next(kept.template for kept in Shelf(templates).all() if kept.template.image == digest)
    folder = Path(f"{where}-{what}")
    try:
        asyncio.run({"floor": floor, "crowd": crowd}[what](template, folder, int(count)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
