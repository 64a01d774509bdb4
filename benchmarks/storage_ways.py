"""Every way to a folder of the host, mounted in one guest at once, for ``bench_storage``."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from storage_guest import (
    GUEST,
    HOST,
    VIRTIOFSD,
    SharedGuest,
    Unavailable,
    background,
    free_port,
    must,
    wait_for_port,
)

from wnodes_core.api import Export, Filesystem, Mount
from wnodes_core.backends.libvirt import devices
from wnodes_core.backends.libvirt.qmp import Monitor
from wnodes_core.errors import WnodesError
from wnodes_core.mounting import SHOW_SCRATCH
from wnodes_core.storage import nfs, nfs_ganesha, sshfs
from wnodes_core.storage import virtiofs as virtiofs_gateway

GANESHA, RPCBIND = "/usr/bin/ganesha.nfsd", "/sbin/rpcbind"
CHANNEL, BARE, ATTACH = 0, 1, 2  # which mount port is whose
FIRST_PORT = 256  # the default of gateway_ports
NFS_STAGE = f"{nfs._STAGES}/nfs"  # and the number of the export
SSHD = """HostKey {0}/host
AuthorizedKeysFile {0}/user.pub
StrictModes no
PasswordAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
GANESHA_CONF = """NFS_CORE_PARAM {{ NFS_Port = {0}; Protocols = 4; Enable_UDP = false;
    Enable_NLM = false; Enable_RQUOTA = false; }}
NFS_KRB5 {{ Active_krb5 = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs; Minor_Versions = 1,2; }}
LOG {{ Default_Log_Level = WARN; }}
EXPORT {{ Export_Id = 1; Path = {1}; Pseudo = /wnodes; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Transports = TCP; FSAL {{ Name = VFS; }} }}
"""


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
    return [guest.virtiofsd.pid]


def virtiofs_clone(guest: SharedGuest, target: str) -> list[int]:
    """As a clone has it: plugged into the running guest, whose memory the gateway copies from and to."""
    mount = Mount(str(guest.source), target)
    memory = os.open(f"/proc/{guest.process.pid}/mem", os.O_RDWR)
    try:
        made = virtiofs_gateway.wnodes_mount_equip(mount, 0, str(guest.folder), {}, "virtiofs", memory)
    finally:
        os.close(memory)
    assert made is not None
    wire = socket.socket(socket.AF_UNIX)
    wire.connect(f"{guest.folder}/qmp")
    monitor = Monitor(wire, "bench")
    for chardev, device in devices.filesystem_orders([Filesystem(**made["filesystem"])], "free"):
        monitor.ask("chardev-add", **chardev)
        monitor.ask("device_add", **device)
    monitor.close()
    told = {**guest.facts, "port": "org.wnodes.mount.0", "equipped": made}
    shown = virtiofs_gateway.wnodes_mount_attach(mount, "", told, "virtiofs")
    assert shown is not None
    in_the_guest(guest, shown["guest"])
    return [made["process"]["pid"]]


def sshfs_channel(guest: SharedGuest, target: str, port: int = CHANNEL) -> list[int]:
    return [attach_sshfs(guest, target, port)["process"]["pid"]]


def attach_sshfs(guest: SharedGuest, target: str, port: int) -> dict[str, Any]:
    """As the keeper does it: the gateway, then the steps in the guest."""
    told = {**guest.facts, "port": f"org.wnodes.mount.{port}"}
    made = sshfs.wnodes_mount_attach(Mount(str(guest.source), target), guest.socket(port + 1), told, "sshfs")
    assert made is not None
    in_the_guest(guest, made["guest"])
    return made


def in_the_guest(guest: SharedGuest, steps: list[dict[str, Any]]) -> None:
    """The steps of an attachment."""
    for step in steps:
        must(guest, step["argv"], **{name: value for name, value in step.items() if name != "argv"})


def sshfs_socat(guest: SharedGuest, target: str) -> list[int]:
    port, server = free_port(), sshfs.find_server()
    process = background(guest, "socat", f"TCP-LISTEN:{port},bind={HOST},nodelay", f"EXEC:{server},nofork")
    wait_for_port(port)
    _sshfs(guest, f"{HOST}:{guest.source}", target, f"directport={port}")
    return [process.pid]


def sshfs_encrypted(guest: SharedGuest, target: str) -> list[int]:
    if not os.path.exists("/usr/sbin/sshd"):
        raise Unavailable("no /usr/sbin/sshd: install openssh-server")
    must(guest, "command -v ssh >/dev/null || { echo 'no ssh in the image' >&2; exit 1; }")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", guest.folder / key], check=True)
    (guest.folder / "sshd").write_text(SSHD.format(guest.folder))
    port = free_port()
    address = f"ListenAddress={HOST}:{port}"
    process = background(guest, "/usr/sbin/sshd", "-D", "-f", str(guest.folder / "sshd"), "-o", address)
    wait_for_port(port)
    key = (guest.folder / "user").read_text()
    must(guest, f"mkdir -p /root/.ssh; umask 077; cat >/root/.ssh/bench <<'KEY'\n{key}KEY")
    known = "StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,IdentityFile=/root/.ssh/bench"
    _sshfs(guest, f"root@{HOST}:{guest.source}", target, f"port={port},{known}")
    return [process.pid]  # its children come and go: they are found when they are counted


def nfs_gateway(guest: SharedGuest, target: str) -> list[int]:
    export = nfs_export(guest, 0)
    attach_nfs(guest, export, target)
    return [process.pid for process in nfs_ganesha.processes_of(export.name)]


def nfs_export(guest: SharedGuest, number: int) -> Export:
    """What wnodesd would ask the gateway to serve, as the owner of this benchmark."""
    user, group = os.getuid(), os.getgid()
    return Export(
        lease=f"bench-{os.getpid()}", index=number, provider=nfs.NAME, source=str(guest.source), read_only=False,
        uid=user, gid=group, groups=(group,), node=HOST, local=GUEST, port=FIRST_PORT + number,
        folder=f"/run/wnodes/exports/{number}",
    )  # fmt: skip


def serve_nfs(guest: SharedGuest, export: Export) -> dict[str, Any] | None:
    """A gateway, until the guest's end at the latest. Raises Unavailable."""
    guest.exports = [*getattr(guest, "exports", []), export]
    try:
        return nfs.wnodes_mount_export(export=export)
    except WnodesError as error:
        raise Unavailable(error.message) from error


def attach_nfs(guest: SharedGuest, export: Export, target: str) -> None:
    """As wnodesd and the keeper do it: the gateway, then the steps in the guest. Raises Unavailable."""
    told = {**guest.facts, "port": f"nfs{export.index}", "export": serve_nfs(guest, export)}
    made = nfs.wnodes_mount_attach(Mount(str(guest.source), target), "", told, nfs.NAME)
    assert made is not None
    in_the_guest(guest, made["guest"])


def bare_ganesha(guest: SharedGuest, target: str) -> list[int]:
    """Without the gateway's confinement, to see what that costs."""
    if not (os.path.exists(GANESHA) and os.path.exists(RPCBIND)):
        raise Unavailable(f"no {GANESHA} or no {RPCBIND}: install nfs-ganesha-vfs and rpcbind")
    background(guest, RPCBIND, "-f")  # ganesha does not serve without it
    wait_for_port(111)
    port = free_port()
    (guest.folder / "ganesha.conf").write_text(GANESHA_CONF.format(port, guest.source))
    named = {"-f": "ganesha.conf", "-L": "ganesha.log", "-p": "ganesha.pid"}
    words = [word for flag, name in named.items() for word in (flag, str(guest.folder / name))]
    server = background(guest, GANESHA, "-F", *words)
    wait_for_port(port, 30)
    options = f"vers=4.2,port={port},addr={HOST},clientaddr={GUEST},{nfs._OPTIONS},{nfs.PATIENCE}"
    must(guest, f"modprobe nfsv4; mkdir -p {target}; mount -i -t nfs4 -o {options} {HOST}:/wnodes {target}")
    return [server.pid]


def ninep(guest: SharedGuest, target: str) -> list[int]:
    # 512000: what the kernel's virtio transport takes at most (net/9p/trans_virtio.c: 125 pages).
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap"
    must(guest, f"modprobe 9pnet_virtio; modprobe 9p; mkdir -p {target}; mount -t 9p -o {options} bench9p {target}")
    return []


WAYS: dict[str, Callable[[SharedGuest, str], list[int]]] = {
    "overlay disk": overlay,
    "scratch disk": scratch_disk,
    "virtiofs": virtiofs,
    "virtiofs, clone": virtiofs_clone,
    "sshfs, channel": sshfs_channel,
    "sshfs, TCP (socat)": sshfs_socat,
    "sshfs, encrypted": sshfs_encrypted,
    "NFS": nfs_gateway,
    "NFS, bare ganesha": bare_ganesha,
    "9p": ninep,
}
OWN_DISK = ("overlay disk", "scratch disk")


def target_of(way: str) -> str:
    """Where the guest has this way's folder."""
    return f"/bench/{list(WAYS).index(way)}"


def _sshfs(guest: SharedGuest, source: str, target: str, options: str) -> None:
    common = ",".join(word for word in sshfs._OPTIONS if word != "passive")
    must(guest, f"mkdir -p {target}; sshfs '{source}' {target} -o {common},{options}")
    more = f"d=/sys/class/bdi/$(mountpoint -d {target}); echo {sshfs._READ_AHEAD_KIB} >$d/read_ahead_kb"
    must(guest, more)


# The port without any file system: what no client that sits on it can pass.
_BARE = """
import json, os, subprocess, sys, time
def busy():
    words = [int(word) for word in open("/proc/stat").readline().split()[1:9]]
    return (sum(words) - words[3] - words[4]) / os.sysconf("SC_CLK_TCK")
way, name, mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = "/sys/class/virtio-ports"
port = [each for each in os.listdir(names) if open(f"{names}/{each}/name").read().strip() == name][0]
ends = {"write": ("/dev/zero", f"/dev/{port}"), "read": (f"/dev/{port}", "/dev/null")}[way]
argv = ["dd", f"if={ends[0]}", f"of={ends[1]}", "bs=64k", f"count={mib * 16}", "iflag=fullblock"]
began, before = time.monotonic(), busy()
subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
print(json.dumps({way: mib / (time.monotonic() - began), f"{way} cpu": busy() - before}))
"""


def bare_port(guest: SharedGuest, way: str, mib: int, call: Callable[[list[str]], str]) -> str:
    """``write`` or ``read`` (as the guest sees it) so much through a port, with ``call`` to run it in the guest."""
    with socket.socket(socket.AF_UNIX) as port:
        port.connect(guest.socket(BARE + 1))
        other = threading.Thread(target=_drain if way == "write" else _feed, args=(port, mib << 20))
        other.start()
        said = call(["python3", "-I", "-c", _BARE, way, f"org.wnodes.mount.{BARE}", str(mib)])
        other.join(60)
    return said


def _drain(port: socket.socket, left: int) -> None:
    while left > 0:
        left -= len(port.recv(1 << 20))


def _feed(port: socket.socket, left: int) -> None:
    block = bytes(1 << 16)
    for _ in range(left >> 16):
        port.sendall(block)
