"""The image store beside curl and qemu-img: fetch, overlay, disk use."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figure import Figure, in_turn, median_ratio, seconds_of

from wnodes_core.images import Entry, Part, Store, disks
from wnodes_core.images.hashing import digest_of
from wnodes_core.model import Disk
from wnodes_core.plugins import Plugins

IMAGE_BYTES = 512 << 20
PAIRS = 9
OVERLAYS = 40


def measure() -> list[Figure]:
    """Every figure of the image store."""
    # /var/tmp: on the disk where images lie; /tmp may be memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="wnodes-bench-") as name:
        folder = Path(name)
        return [_fetch(folder), *_overlays(folder), _disk_use(folder), _scattered(folder)]


@contextmanager
def _served(path: Path) -> Iterator[str]:
    """The file over HTTP by sendfile, in a process of its own that costs next to nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        while True:
            connection = listener.accept()[0]
            threading.Thread(target=_answer, args=(connection, path), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/disk"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        listener.close()


def _answer(connection: socket.socket, path: Path) -> None:
    with connection, open(path, "rb") as file:
        connection.recv(65536)
        size = os.fstat(file.fileno()).st_size
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % size)
        connection.sendfile(file)


def _fetch(folder: Path) -> Figure:
    source, copy = folder / "source", folder / "copy"
    with open(source, "wb") as file:
        for _ in range(IMAGE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
    os.sync()
    store = Store(folder / "store", Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    digest = digest_of(source)
    with _served(source) as url:
        entry = Entry("bench", "latest", Part(digest, (url,)), "raw")

        def curl() -> None:
            subprocess.run(["curl", "-sS", "-o", copy, url], check=True)

        def ours() -> None:
            store.ensure(entry)

        theirs, mine = [], []
        for _ in range(PAIRS):
            for action, seconds in ((curl, theirs), (ours, mine)):
                copy.unlink(missing_ok=True)
                store.layout.blob(digest).unlink(missing_ok=True)
                os.sync()
                seconds += seconds_of(action, 1)
    ratio = median_ratio(theirs, mine)
    rates = [IMAGE_BYTES / 1e6 / statistics.median(seconds) for seconds in (mine, theirs)]
    note = f"{rates[0]:.0f} MB/s with sha256 against {rates[1]:.0f} MB/s without, 512 MiB from loopback, {PAIRS} pairs"
    return Figure("image fetch, rate against curl", ratio, "×", "≥ 0.95", ratio >= 0.95, note)


def _overlays(folder: Path) -> Iterator[Figure]:
    os.sync()  # qemu-img flushes what it made: it must not wait for other figures' data
    for gib in (1, 100):
        base = folder / f"base{gib}"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, f"{gib}G"], check=True)
        disk = Disk(str(folder / "overlay"), "qcow2", str(base), "qcow2")

        def ours(disk: Disk = disk) -> None:
            disks.wnodes_disk_create(disk)

        def bare() -> None:
            subprocess.run(["qemu-img", "--version"], check=True, stdout=subprocess.DEVNULL)

        mine, floor = in_turn(ours, bare, OVERLAYS)
        ms = statistics.median(mine) * 1e3
        note = f"floor {statistics.median(floor) * 1e3:.1f} ms: `qemu-img --version`; {OVERLAYS} pairs"
        yield Figure(f"overlay on a {gib} GiB image", ms, "ms", "≤ 20", ms <= 20, note)


def _overlay(folder: Path, writes: list[str]) -> int:
    """Bytes on the disk after those qemu-io commands on a fresh overlay."""
    base, overlay = folder / "base10", folder / "overlay10"
    if not base.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "10G"], check=True)
    overlay.unlink(missing_ok=True)
    disks.wnodes_disk_create(Disk(str(overlay), "qcow2", str(base), "qcow2"))
    commands = "\n".join(writes).encode()
    subprocess.run(["qemu-io", "-f", "qcow2", overlay], input=commands, check=True, stdout=subprocess.DEVNULL)
    return overlay.stat().st_blocks * 512


def _disk_use(folder: Path) -> Figure:
    over = _overlay(folder, ["write -q 1M 256M"]) - (256 << 20)
    fresh = _overlay(folder, [])
    note = f"256 MiB in one piece; a fresh overlay has {fresh >> 10} KiB"
    return Figure("disk of a VM beyond what it wrote", over / 2**20, "MiB", "≤ 1", over <= 1 << 20, note)


def _scattered(folder: Path) -> Figure:
    import random

    chance = random.Random(1)
    blocks = chance.sample(range((1 << 30) // 4096), 2000)
    over = _overlay(folder, [f"write -q {block * 4096} 4096" for block in blocks]) - 2000 * 4096
    note = "2000 blocks of 4 KiB anywhere in 1 GiB; plain qcow2 clusters would take 60 KiB more for each"
    return Figure("the same, scattered small writes", over / 2**20, "MiB", "≤ 1", over <= 1 << 20, note)


if __name__ == "__main__":
    found: list[dict[str, Any]] = [figure.to_dict() for figure in measure()]
    print(json.dumps(found, indent=1, ensure_ascii=False))
