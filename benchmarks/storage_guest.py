"""One guest that has every device and wire which the ways of ``storage_ways`` want, and what they share."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ground import WORK, image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from guests import Guest

from wnodes_core.api import Disk
from wnodes_core.guest.guest_users import loopback_up
from wnodes_core.model import Image
from wnodes_core.storage import nfs, scratch, sshfs

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
KIND = "full"  # all ways in one kernel: Debian's cloud kernel has no 9p
BUILD = Path(__file__).parent.parent / "scripts" / "build-image"
PORTS = 8
_NEWNS, _NEWNET = 0x00020000, 0x40000000
HOST, GUEST, TAP = "10.0.2.2", "10.0.2.15", "wn-tap"


class Unavailable(Exception):
    """A way that cannot be had here; the words say why."""


class SharedGuest(Guest):
    """Its memory is shared, as virtiofs wants it; it has a scratch disk, a 9p device and a tap on a bridge."""

    def _argv(self, image: Image, overlay: str, ports: Any, memory_mib: int, cpus: int) -> list[str]:
        argv = super()._argv(image, overlay, ports, memory_mib, cpus)
        # As the product has it: the host's page cache is not the guest's disk.
        argv = [word.replace("cache=unsafe", "cache=none") for word in argv]
        argv += ["-object", f"memory-backend-memfd,id=m,size={memory_mib}M,share=on", "-numa", "node,memdev=m"]
        self.scratch = Disk(f"{self.folder}/scratch.raw", "raw", serial="scratch", size_mib=1024)
        scratch.wnodes_disk_create(self.scratch)
        argv += ["-drive", f"file={self.scratch.path},format=raw,if=none,id=s,cache=none"]
        argv += ["-device", "virtio-blk-pci,drive=s,serial=scratch,addr=0x10"]  # behind the root disk
        argv += ["-netdev", f"tap,id=n0,ifname={TAP},script=no,downscript=no"]
        argv += ["-device", "virtio-net-pci,netdev=n0,romfile="]
        self.source = self.folder / "source"
        self.source.mkdir()
        argv += ["-fsdev", f"local,id=f,path={self.source},security_model=none,multidevs=remap"]
        argv += ["-device", "virtio-9p-pci,fsdev=f,mount_tag=bench9p"]
        argv += ["-device", "pcie-root-port,id=free,chassis=1", "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"]
        return argv + self._virtiofs()

    def _virtiofs(self) -> list[str]:
        self.virtiofsd = None
        if not os.path.exists(VIRTIOFSD):
            return []
        path = f"{self.folder}/virtiofs.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            words = [VIRTIOFSD, f"--fd={listener.fileno()}", "-o", f"source={self.source}"]
            with open(self.folder / "virtiofsd.log", "w") as log:
                self.virtiofsd = subprocess.Popen(words, pass_fds=[listener.fileno()], stderr=log)
        return ["-chardev", f"socket,id=v,path={path}", "-device", "vhost-user-fs-pci,chardev=v,tag=bench"]


def be_alone() -> None:
    """A network and a /run of this process's own: rpcbind has one port and one socket for the whole machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET | _NEWNS):
        raise OSError(ctypes.get_errno(), "unshare: no network of its own (want root)")
    for argv in (["--make-rprivate", "/"], ["-t", "tmpfs", "tmpfs", "/run"]):
        subprocess.run(["mount", *argv], check=True)
    for folder in ("rpcbind", "ganesha", "sshd"):
        os.mkdir(f"/run/{folder}")
    loopback_up()
    # As the product's bridge: a tap with offloads, so that 64 KiB cross it in one piece.
    for text in (
        "link add wn-br type bridge",
        f"addr add {HOST}/24 dev wn-br",
        f"tuntap add dev {TAP} mode tap vnet_hdr",
        f"link set {TAP} master wn-br up",
        "link set wn-br up",
    ):
        subprocess.run(["ip", *text.split()], check=True)


@contextmanager
def guest() -> Iterator[SharedGuest]:
    """The guest, with its network up; its image is built if need be."""
    folder = WORK / "images" / KIND
    subprocess.run([BUILD, folder, "--kind", KIND], check=True, stdout=sys.stderr)
    be_alone()
    signal.signal(signal.SIGTERM, _end)
    booted = SharedGuest(image(KIND), mounts=PORTS, memory_mib=1024)
    try:
        up = "modprobe virtio_net; until ip link show eth0; do sleep 0.1; done; ip link set lo up"
        must(booted, f"({up}; ip addr add {GUEST}/24 dev eth0; ip link set eth0 up) >/dev/null 2>&1")
        yield booted
    finally:
        end_helpers(booted)
        booted.close()
        if booted.virtiofsd is not None:
            booted.virtiofsd.kill()
            booted.virtiofsd.wait()


def _end(number: int, _: Any) -> None:
    """Let NFS gateways be ended, which outlive who started them; nobody disturbs that (timeout(1) tells twice)."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def must(guest: Guest, command: str | list[str], **more: Any) -> str:
    """Run something that has to succeed in the guest. Raises Unavailable with what it said."""
    done = guest.run(command, **more)
    if done.code:
        raise Unavailable((done.stderr or done.stdout).decode(errors="replace").strip()[-300:] or f"code {done.code}")
    return done.stdout.decode()


def background(guest: SharedGuest, *argv: str, **more: Any) -> subprocess.Popen[bytes]:
    """A process on the host that lives as long as the guest."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **more
    )
    guest.helpers = [*getattr(guest, "helpers", []), process]
    return process


def end_helpers(guest: SharedGuest) -> None:
    """End what the ways have started on the host."""
    for process in getattr(guest, "helpers", []):
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    for export in getattr(guest, "exports", []):
        nfs.wnodes_mount_unexport(export=export)
    for pid in sshfs.gateways():
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    sshfs.reap()
    shutil.rmtree(guest.folder / "source", ignore_errors=True)


def children(pid: int) -> list[int]:
    """Pids of all that descend from this process."""
    with suppress(OSError):
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found + [child for each in found for child in children(each)]
    return []


def cpu_seconds(pids: list[int]) -> float:
    """CPU seconds that these processes and their living children have used."""
    total = 0.0
    for pid in {each for parent in pids for each in (parent, *children(parent))}:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def listeners() -> str:
    """Local ends of all listening TCP sockets (proc(5): state 0A), one a line, each with zeros for its other end."""
    text = "\n".join(Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for line in text.splitlines()]
    return "\n".join(f"{words[1]} {words[2]}" for words in lines if words[3:4] == ["0A"])


def wait_for_port(port: int, patience_s: float = 10) -> None:
    """Until somebody listens there. Raises Unavailable."""
    end = time.monotonic() + patience_s
    while f":{port:04X} 00000000" not in listeners():
        if time.monotonic() > end:
            raise Unavailable(f"nobody listens on port {port} after {patience_s:g} s")
        time.sleep(0.05)
