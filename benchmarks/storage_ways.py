"""One guest that reaches one host folder in every way at once, for ``bench_storage``."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ground import WORK

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from guests import Guest

from wnodes_core.api import Disk, Mount
from wnodes_core.guest.guest_users import loopback_up
from wnodes_core.model import Boot, Image
from wnodes_core.mounting import SHOW_SCRATCH
from wnodes_core.storage import scratch, sshfs

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
GANESHA, RPCBIND = "/usr/bin/ganesha.nfsd", "/sbin/rpcbind"
_NEWNS, _NEWNET = 0x00020000, 0x40000000
HOST = "10.0.2.2"  # the host's loopback, as QEMU's user network shows it
SSHD = """HostKey {0}/host
AuthorizedKeysFile {0}/user.pub
StrictModes no
PasswordAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
EXPORTS = """NFS_CORE_PARAM {{ NFS_Port = {1}; Protocols = 4; Enable_UDP = false;
    Enable_NLM = false; Enable_RQUOTA = false; }}
NFS_KRB5 {{ Active_krb5 = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs; Minor_Versions = 1,2; }}
EXPORT {{ Export_Id = 1; Path = {0}; Pseudo = /wnodes; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
    Transports = TCP; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = WARN; }}
"""


class Unavailable(Exception):
    """A way that cannot be had here; the words say why."""


class SharedGuest(Guest):
    """Its memory is shared, as virtiofs wants it; it has a scratch disk and a network that ends on 127.0.0.1."""

    def _argv(self, image: Image, overlay: str, ports: Any, memory_mib: int, cpus: int) -> list[str]:
        argv = super()._argv(image, overlay, ports, memory_mib, cpus)
        argv += ["-object", f"memory-backend-memfd,id=m,size={memory_mib}M,share=on", "-numa", "node,memdev=m"]
        self.scratch = Disk(f"{self.folder}/scratch.raw", "raw", serial="scratch", size_mib=1024)
        scratch.wnodes_disk_create(self.scratch)
        argv += ["-drive", f"file={self.scratch.path},format=raw,if=none,id=s,cache=none"]
        argv += ["-device", "virtio-blk-pci,drive=s,serial=scratch,addr=0x10"]  # behind the root disk
        argv += ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="]
        self.source = self.folder / "source"
        self.source.mkdir()
        self.virtiofsd = None
        if os.path.exists(VIRTIOFSD):
            path = f"{self.folder}/virtiofs.sock"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen(1)
                words = [VIRTIOFSD, f"--fd={listener.fileno()}", "-o", f"source={self.source}"]
                with open(self.folder / "virtiofsd.log", "w") as log:
                    self.virtiofsd = subprocess.Popen(words, pass_fds=[listener.fileno()], stderr=log)
            argv += ["-chardev", f"socket,id=v,path={path}", "-device", "vhost-user-fs-pci,chardev=v,tag=bench"]
        return argv


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
    # getaddrinfo(3) knows no address on a machine that has nothing but 127.0.0.1.
    subprocess.run(["ip", "addr", "add", "192.0.2.1/32", "dev", "lo"], check=True)


@contextmanager
def guest() -> Iterator[SharedGuest]:
    """The guest, with its network up."""
    be_alone()
    folder = WORK / "images" / "minimal"
    lines = dict(line.strip().partition(": ")[::2] for line in (folder / "image.yaml").read_text().splitlines())
    boot = Boot(str(folder / "vmlinuz"), str(folder / "initrd"), lines["cmdline"].strip('"'))
    image = Image("b", "b", lines["digest"], str(folder / "disk.qcow2"), "qcow2", boot=boot)
    booted = SharedGuest(image, mounts=4, memory_mib=1024)
    try:
        up = "modprobe virtio_net; until ip link show eth0; do sleep 0.1; done; ip link set lo up"
        must(booted, f"({up}; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up) >/dev/null 2>&1")
        yield booted
    finally:
        booted.close()
        if booted.virtiofsd is not None:
            booted.virtiofsd.kill()
            booted.virtiofsd.wait()


def must(guest: Guest, command: str | list[str], **more: Any) -> str:
    """Run something that has to succeed in the guest. Raises Unavailable with what it said."""
    done = guest.run(command, **more)
    if done.code:
        raise Unavailable((done.stderr or done.stdout).decode(errors="replace").strip()[-300:] or f"code {done.code}")
    return done.stdout.decode()


# Each way: mounts the guest's source folder (or its own disk) at the target and returns the gateway's pids.


def overlay(guest: SharedGuest, target: str) -> list[int]:
    must(guest, ["mkdir", "-p", target])
    return []


def scratch_disk(guest: SharedGuest, target: str) -> list[int]:
    must(guest, ["sh", "-c", SHOW_SCRATCH, "scratch", target])
    return []


def virtiofs(guest: SharedGuest, target: str) -> list[int]:
    if guest.virtiofsd is None:
        raise Unavailable(f"no {VIRTIOFSD}")
    must(guest, f"modprobe virtiofs; mkdir -p {target}; mount -t virtiofs bench {target}")
    return [guest.virtiofsd.pid, *_children(guest.virtiofsd.pid)]


def sshfs_channel(guest: SharedGuest, target: str) -> list[int]:
    told = {**guest.facts, "port": "org.wnodes.mount.0"}
    made = sshfs.wnodes_mount_attach(Mount(str(guest.source), target), guest.socket(1), told, "sshfs")
    assert made is not None
    for step in made["guest"]:
        must(guest, **{"command": step.pop("argv"), **step})
    return [made["process"]["pid"]]


def sshfs_socat(guest: SharedGuest, target: str) -> list[int]:
    port, server = _free_port(), sshfs.find_server()
    process = _background(guest, "socat", "-b", "262144", f"TCP-LISTEN:{port},bind=127.0.0.1", f"EXEC:{server}")
    _listening(port)
    _sshfs(guest, f"{HOST}:{guest.source}", target, f"directport={port}")
    return [process.pid, *_children(process.pid)]


def sshfs_encrypted(guest: SharedGuest, target: str) -> list[int]:
    if not os.path.exists("/usr/sbin/sshd"):
        raise Unavailable("no /usr/sbin/sshd: install openssh-server")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", guest.folder / key], check=True)
    (guest.folder / "sshd").write_text(SSHD.format(guest.folder))
    port = _free_port()
    address = f"ListenAddress=127.0.0.1:{port}"
    process = _background(guest, "/usr/sbin/sshd", "-D", "-f", str(guest.folder / "sshd"), "-o", address)
    _listening(port)
    key = (guest.folder / "user").read_text()
    must(guest, f"mkdir -p /root/.ssh; umask 077; cat >/root/.ssh/bench <<'KEY'\n{key}KEY")
    known = "StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,IdentityFile=/root/.ssh/bench"
    _sshfs(guest, f"root@{HOST}:{guest.source}", target, f"port={port},{known}")
    return [process.pid]  # its children come and go: they are found when they are counted


def nfs(guest: SharedGuest, target: str) -> list[int]:
    if not (os.path.exists(GANESHA) and os.path.exists(RPCBIND)):
        raise Unavailable(f"no {GANESHA} or no {RPCBIND}: install nfs-ganesha-vfs and rpcbind")
    _background(guest, RPCBIND, "-f")  # ganesha does not serve without it
    _listening(111)
    port = _free_port()
    (guest.folder / "ganesha.conf").write_text(EXPORTS.format(guest.source, port))
    named = {"-f": "ganesha.conf", "-L": "ganesha.log", "-p": "ganesha.pid"}
    words = [word for flag, name in named.items() for word in (flag, str(guest.folder / name))]
    process = _background(guest, GANESHA, "-F", *words)
    _listening(port, 30)
    options = f"vers=4.1,port={port},addr={HOST},clientaddr=10.0.2.15,sec=sys,proto=tcp"
    must(guest, f"modprobe nfsv4; mkdir -p {target}; mount -i -t nfs4 -o {options} {HOST}:/wnodes {target}")
    return [process.pid]


def ninep(guest: SharedGuest, target: str) -> list[int]:
    must(guest, "modprobe 9p 2>/dev/null || { echo 'Debian cloud kernel: no 9p in it' >&2; exit 1; }")
    raise Unavailable("no 9p device in this benchmark")


WAYS: dict[str, Callable[[SharedGuest, str], list[int]]] = {
    "overlay disk": overlay,
    "scratch disk": scratch_disk,
    "virtiofs": virtiofs,
    "sshfs, channel": sshfs_channel,
    "sshfs, TCP (socat)": sshfs_socat,
    "sshfs, encrypted": sshfs_encrypted,
    "NFS 4.1 (ganesha)": nfs,
    "9p": ninep,
}


def _sshfs(guest: SharedGuest, source: str, target: str, options: str) -> None:
    common = "allow_other,idmap=none,dcache_timeout=1"
    must(guest, f"mkdir -p {target}; sshfs '{source}' {target} -o {common},{options}")


def _background(guest: SharedGuest, *argv: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    guest.helpers = [*getattr(guest, "helpers", []), process]
    return process


def end_helpers(guest: SharedGuest) -> None:
    """End what the ways have started on the host."""
    for process in getattr(guest, "helpers", []):
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    for pid in sshfs.gateways():
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    sshfs.reap()
    shutil.rmtree(guest.folder / "source", ignore_errors=True)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return found + [child for each in found for child in _children(each)]
    return []


def cpu_seconds(pids: list[int]) -> float:
    """CPU seconds that these processes and their living children have used."""
    total = 0.0
    for pid in {each for parent in pids for each in (parent, *_children(parent))}:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listeners() -> str:
    """Local ends of all listening TCP sockets (proc(5): state 0A), one a line, each with zeros for its other end."""
    text = "\n".join(Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for line in text.splitlines()]
    return "\n".join(f"{words[1]} {words[2]}" for words in lines if words[3] == "0A")


def _listening(port: int, patience_s: float = 10) -> None:
    end = time.monotonic() + patience_s
    while f":{port:04X} 00000000" not in _listeners():
        if time.monotonic() > end:
            raise Unavailable(f"nobody listens on port {port} after {patience_s:g} s")
        time.sleep(0.05)
