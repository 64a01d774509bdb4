"""What a mount costs: attached and detached, alone on its node and beside 49 others."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import storage_ways
from figure import Figure, seconds_of
from storage_guest import VIRTIOFSD, SharedGuest, Unavailable, must

from wnodes_core.api import Disk, Mount
from wnodes_core.storage import nfs, scratch, sshfs

MANY, RUNS = 50, 5
Calls = tuple[Callable[[], Any], ...]  # attach, detach, and what is not timed after them
TARGET = "/bench/attach"


def figures(guest: SharedGuest) -> list[Figure]:
    """Each kind at 1 and at 50 leases. The guest is one; the others of 50 are the host's half of a lease."""
    found = []
    for name, kind in KINDS.items():
        try:
            found += _both(name, guest, kind)
        except (Unavailable, OSError) as error:
            found.append(Figure(f"{name}, attach + detach", None, "ms", note=" ".join(str(error).split())))
    return found


def _both(name: str, guest: SharedGuest, kind: Any) -> Iterator[Figure]:
    what, beside, once, others = kind(guest)
    one = _times(once)
    with others(MANY - 1):
        many = _times(once)
    for leases, (up, down) in ((1, one), (MANY, many)):
        note = f"attach {up:.0f} ms, detach {down:.0f} ms, median of {RUNS}; {what}"
        if leases > 1:
            note += f"; beside {beside}; {(up + down) / sum(one):.2f} of what it takes alone"
        yield Figure(f"{name}, attach + detach, {leases} lease{'s'[: leases - 1]}", up + down, "ms", note=note)


def _times(once: Calls) -> tuple[float, float]:
    up, down = [], []
    for _ in range(RUNS):
        up += seconds_of(once[0], 1)
        down += seconds_of(once[1], 1)
        for rest in once[2:]:
            rest()
    return statistics.median(up) * 1e3, statistics.median(down) * 1e3


# Each kind: what is timed and beside what, how it is attached and detached, and others of it that stand by.


def _sshfs(guest: SharedGuest) -> tuple[str, str, Calls, Any]:
    held: list[dict[str, Any]] = []
    running = len(must(guest, "pidof sshfs").split())

    def settle() -> None:
        """The port can be opened again once the guest's sshfs has seen the end; a lease ends with its guest."""
        must(guest, f"umount -l {TARGET}; until [ $(pidof sshfs | wc -w) -le {running} ]; do sleep 0.02; done")

    def attach() -> None:
        held.append(storage_ways.attach_sshfs(guest, TARGET, storage_ways.ATTACH))

    def detach() -> None:
        sshfs.wnodes_mount_detach(held.pop())

    @contextmanager
    def others(count: int) -> Iterator[None]:
        made = []
        with ExitStack() as stack:
            for number in range(count):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                path = f"{guest.folder}/other{number}"
                listener.bind(path)
                listener.listen(1)
                told = {**guest.facts, "port": "org.wnodes.mount.0"}
                made.append(sshfs.wnodes_mount_attach(Mount(str(guest.source), TARGET), path, told, "sshfs"))
                stack.enter_context(listener.accept()[0])
            yield
            for each in made:
                sshfs.wnodes_mount_detach(each)

    return "gateway and mount in the guest", "49 gateways whose guests are stand-ins", (attach, detach, settle), others


def _scratch(guest: SharedGuest) -> tuple[str, str, Calls, Any]:
    def disk(name: str) -> Disk:
        return Disk(f"{guest.folder}/{name}.raw", "raw", serial="scratch", size_mib=64)

    @contextmanager
    def others(count: int) -> Iterator[None]:
        disks = [disk(f"other{number}") for number in range(count)]
        for each in disks:
            scratch.wnodes_disk_create(each)
        yield
        for each in disks:
            scratch.wnodes_disk_delete(each)

    mine = disk("attach")
    pair = (lambda: scratch.wnodes_disk_create(mine), lambda: scratch.wnodes_disk_delete(mine))
    return "64 MiB made and removed on the host, no VM", "49 others", pair, others


def _virtiofs(guest: SharedGuest) -> tuple[str, str, Calls, Any]:
    if guest.virtiofsd is None:
        raise Unavailable(f"no {VIRTIOFSD}")
    started: list[subprocess.Popen[bytes]] = []

    def serve(number: int) -> subprocess.Popen[bytes]:
        path = f"{guest.folder}/v{number}-{time.monotonic_ns()}"
        words = [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={guest.source}"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        while not os.path.exists(path):
            time.sleep(0.001)
        return process

    def end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def attach() -> None:
        started.append(serve(0))
        must(guest, ["mount", "-t", "virtiofs", "bench", f"{TARGET}v"])

    def detach() -> None:
        must(guest, ["umount", f"{TARGET}v"])
        end(started.pop())

    @contextmanager
    def others(count: int) -> Iterator[None]:
        made = [serve(number) for number in range(1, count + 1)]
        yield
        for each in made:
            end(each)

    must(guest, f"umount {storage_ways.target_of('virtiofs')}; mkdir -p {TARGET}v")
    note = "virtiofsd to its socket, and mount of a device that the VM has"
    return note, "49 daemons that wait", (attach, detach), others


def _nfs(guest: SharedGuest) -> tuple[str, str, Calls, Any]:
    if lacks := nfs.wnodes_mount_usable()["problem"]:
        raise Unavailable(lacks)
    mine = storage_ways.nfs_export(guest, MANY)

    def detach() -> None:
        must(guest, ["umount", f"{TARGET}n", f"{storage_ways.NFS_STAGE}{MANY}"])
        nfs.wnodes_mount_unexport(export=mine)

    @contextmanager
    def others(count: int) -> Iterator[None]:
        made = [storage_ways.nfs_export(guest, number) for number in range(1, count + 1)]
        for each in made:
            storage_ways.serve_nfs(guest, each)
        yield
        for each in made:
            nfs.wnodes_mount_unexport(export=each)

    attach = partial(storage_ways.attach_nfs, guest, mine, f"{TARGET}n")
    return "gateway and mount in the guest", "49 gateways without a client", (attach, detach), others


def _ninep(guest: SharedGuest) -> tuple[str, str, Calls, Any]:
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap"
    must(guest, f"umount {storage_ways.target_of('9p')}; mkdir -p {TARGET}9")

    def attach() -> None:
        must(guest, ["mount", "-t", "9p", "-o", options, "bench9p", f"{TARGET}9"])

    @contextmanager
    def others(_: int) -> Iterator[None]:
        yield

    return (
        "mount of a device that the VM has",
        "nobody: it has no process on the host",
        (attach, lambda: must(guest, ["umount", f"{TARGET}9"])),
        others,
    )


KINDS = {
    "sshfs mount": _sshfs,
    "scratch disk": _scratch,
    "virtiofs mount": _virtiofs,
    "NFS mount": _nfs,
    "9p mount": _ninep,
}
