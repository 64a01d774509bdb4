"""Many VMs, one host: what all their mounts together carry. Clones of one template, a gateway each.

Also a program, which runs as the ordinary user: storage_clients.py TEMPLATES IMAGE-DIGEST FOLDER
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # run with -P: its own folder is not there
import bench_warm
import warm_floor
from figure import Figure
from ground import CannotRun, ground, image, one_guest

from wnodes_core.api import Filesystem, Mount
from wnodes_core.backends.libvirt import plugin
from wnodes_core.storage import sshfs, virtiofs
from wnodes_core.templates import Shelf

CLIENTS = (1, 2, 4, 8, 16)
MIB = 96  # of all clients together
TARGETS = {"sshfs": "/bench/s", "virtiofs": "/bench/v"}  # as a clone can have them, side by side
WRITE = "dd if=/dev/zero of={0}/f{1} bs=256k count={2} conv=fsync 2>/dev/null"
READ = "dd if={0}/f{1} of=/dev/null bs=256k 2>/dev/null"
COLD = "sync; echo 3 >/proc/sys/vm/drop_caches"


Curve = list[tuple[int, float, float]]


def curves() -> dict[str, Curve]:
    """(clients, MiB/s written, MiB/s read) of each way, or nothing where no template can be had."""
    try:
        with one_guest(), ground("minimal") as place:
            bench_warm.own_templates(place)
            bench_warm.first_byte(place, "minimal", "warm")
            folder = place.folder / "f"
            argv = [sys.executable, "-P", __file__, place.folder / "templates", image("minimal").digest, folder]
            done = place.popen([str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            out, err = done.communicate(timeout=bench_warm.DEADLINE_S)
    except CannotRun as error:
        print(f"benchmarks: storage: clients: {error}", file=sys.stderr)
        return {}
    if done.returncode:
        raise RuntimeError(f"clients: {err.decode()[-800:]}")
    found: dict[str, Curve] = {}
    for line in out.splitlines():
        way, *point = json.loads(line)
        found.setdefault(way, []).append(tuple(point))
    return found


def figures(found: dict[str, Curve]) -> list[Figure]:
    """The curves' ends."""
    if not found:
        return [Figure("clients of one host", None, "", note="no template could be had")]
    note = f"{MIB} MiB in all, clones of one template, each with its gateway; "
    lines = []
    for way, curve in found.items():
        for number, what in ((1, "written"), (2, "read")):
            shown = note + ", ".join(f"{each[0]}: {each[number]:.0f} MiB/s" for each in curve)
            ratio = curve[-1][number] / curve[0][number]
            name = f"{way}: {what} by {curve[-1][0]} clients of one host, of what one has"
            lines.append(Figure(name, ratio, "×", note=shown))
    return lines


async def _client(template: Any, folder: Path, number: int) -> Any:
    awake = await warm_floor.start(template, folder, number, template.shape.memory_mib, mounts=True)
    source = folder / f"s{number}"
    source.mkdir()
    told = {**await awake.channel.request("hello"), "port": "org.wnodes.mount.0"}
    served = sshfs.wnodes_mount_attach(
        Mount(str(source), TARGETS["sshfs"]), awake.vm.channels[1].path, told, sshfs.NAME
    )
    plugged, shown = _plugged(awake, Mount(str(source), TARGETS["virtiofs"]), told)
    assert served is not None
    for step in (*served["guest"], *shown["guest"]):
        done = await awake.channel.run(step.pop("argv"), **step)
        assert done.code == 0, done.stderr
    return awake, served, plugged


def _plugged(awake: Any, mount: Mount, told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As a keeper does it: the device, and how the guest mounts it."""
    memory = os.open(f"/proc/{awake.pid}/mem", os.O_RDWR)
    try:
        made = virtiofs.wnodes_mount_equip(mount, 0, awake.vm.folder, {}, virtiofs.NAME, memory)
    finally:
        os.close(memory)
    assert made is not None and plugin.wnodes_filesystems_plug(awake.vm, (Filesystem(**made["filesystem"]),))
    shown = virtiofs.wnodes_mount_attach(mount, "", {**told, "port": "plugged", "equipped": made}, virtiofs.NAME)
    assert shown is not None
    return made, shown


async def _all(clients: list[Any], command: str, target: str, mib: int) -> float:
    """Seconds until the last client has done it."""
    began = time.perf_counter()
    # As the job's user: virtiofs's server in C takes nobody else.
    become = ["setpriv", f"--reuid={os.getuid()}", f"--regid={os.getgid()}", "--clear-groups"] if mib else []
    words = [[*become, "sh", "-c", command.format(target, number, mib * 4)] for number in range(len(clients))]
    done = await asyncio.gather(
        *(client[0].channel.run(argv, timeout_s=120) for client, argv in zip(clients, words, strict=True))
    )
    assert not any(each.code for each in done), done
    return time.perf_counter() - began


async def _measured(template: Any, folder: Path) -> None:
    clients: list[Any] = []
    try:
        for count in CLIENTS:
            while len(clients) < count:
                clients.append(await _client(template, folder, len(clients)))
            mib = MIB // count
            for way, target in TARGETS.items():
                await _all(clients, COLD, target, 0)
                wrote = await _all(clients, WRITE, target, mib)
                await _all(clients, COLD, target, 0)
                read = await _all(clients, READ, target, mib)
                print(json.dumps([way, count, count * mib / wrote, count * mib / read]), flush=True)
    finally:
        for awake, served, plugged in clients:
            plugin.wnodes_vm_stop(vm=awake.vm)
            sshfs.wnodes_mount_detach(served)
            virtiofs.wnodes_mount_detach(plugged)


def main() -> None:
    """Command line."""
    templates, digest, where = sys.argv[1:]
    template = next(kept.template for kept in Shelf(templates).all() if kept.template.image == digest)
    folder = Path(where)
    folder.mkdir()
    try:
        asyncio.run(_measured(template, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
