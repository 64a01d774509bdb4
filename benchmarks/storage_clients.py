"""Many VMs, one host: what all their mounts together carry. Clones of one template, a gateway each.

Also a program, which runs as the ordinary user: storage_clients.py TEMPLATES IMAGE-DIGEST FOLDER
"""

from __future__ import annotations

import asyncio
import json
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

from wnodes_core.api import Mount
from wnodes_core.backends.libvirt import plugin
from wnodes_core.storage import sshfs
from wnodes_core.templates import Shelf

CLIENTS = (1, 2, 4, 8, 16)
MIB = 96  # of all clients together
TARGET = "/bench"
WRITE = "dd if=/dev/zero of={0}/f{1} bs=256k count={2} conv=fsync 2>/dev/null"
READ = "dd if={0}/f{1} of=/dev/null bs=256k 2>/dev/null"
COLD = "sync; echo 3 >/proc/sys/vm/drop_caches"


def curve() -> list[tuple[int, float, float]]:
    """(clients, MiB/s written, MiB/s read), or nothing where no template can be had."""
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
        return []
    if done.returncode:
        raise RuntimeError(f"clients: {err.decode()[-800:]}")
    return [tuple(json.loads(line)) for line in out.splitlines()]


def figures(found: list[tuple[int, float, float]]) -> list[Figure]:
    """The curve's ends."""
    if not found:
        return [Figure("clients of one host", None, "", note="no template could be had")]
    note = f"{MIB} MiB in all, clones of one template, each with its gateway; "
    lines = []
    for number, what in ((1, "written"), (2, "read")):
        shown = note + ", ".join(f"{each[0]}: {each[number]:.0f} MiB/s" for each in found)
        ratio = found[-1][number] / found[0][number]
        lines.append(Figure(f"{what} by {found[-1][0]} clients of one host, of what one has", ratio, "×", note=shown))
    return lines


async def _client(template: Any, folder: Path, number: int) -> Any:
    awake = await warm_floor.start(template, folder, number, template.shape.memory_mib, mounts=True)
    source = folder / f"s{number}"
    source.mkdir()
    told = {**await awake.channel.request("hello"), "port": "org.wnodes.mount.0"}
    made = sshfs.wnodes_mount_attach(Mount(str(source), TARGET), awake.vm.channels[1].path, told, "sshfs")
    assert made is not None
    for step in made["guest"]:
        done = await awake.channel.run(step.pop("argv"), **step)
        assert done.code == 0, done.stderr
    return awake, made


async def _all(clients: list[Any], command: str, mib: int) -> float:
    """Seconds until the last client has done it."""
    began = time.perf_counter()
    words = [["sh", "-c", command.format(TARGET, number, mib * 4)] for number in range(len(clients))]
    done = await asyncio.gather(
        *(client.channel.run(argv, timeout_s=120) for (client, _), argv in zip(clients, words, strict=True))
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
            await _all(clients, COLD, 0)
            wrote = await _all(clients, WRITE, mib)
            await _all(clients, COLD, 0)
            read = await _all(clients, READ, mib)
            print(json.dumps([count, count * mib / wrote, count * mib / read]), flush=True)
    finally:
        for awake, made in clients:
            plugin.wnodes_vm_stop(vm=awake.vm)
            sshfs.wnodes_mount_detach(made)


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
