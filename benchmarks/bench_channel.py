"""The command channel beside ssh into the same guest, and beside the bare device under it.

One guest of the small image with one CPU. ssh comes through QEMU's user network from 127.0.0.1;
its server is this machine's own (or Debian's package, unpacked), carried into the guest.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from figure import Figure, median_ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from guests import Guest

from wnodes_core.guest.relay import Relay
from wnodes_core.model import Boot, Image

WORK = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"))
RUNS, ROUNDS = 15, 5
MIB, SSH_MIB = 200, 20
LAUNCHER = """
import sys
from wnodes_core.guest import client
closed = client.reserve_stdio()
command = client.Command(sys.argv[2:], "/", {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
client.die_like(client.run(sys.argv[1], command, closed=closed))
"""
SSHD = """
set -e
mkdir -p /run/sshd /tmp/ssh
tar -xf - -C /tmp/ssh
grep -q ^sshd: /etc/passwd || echo 'sshd:x:110:65534::/run/sshd:/usr/sbin/nologin' >> /etc/passwd
modprobe virtio_net
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
chmod 600 /tmp/ssh/host; chown -R 0:0 /tmp/ssh
LD_LIBRARY_PATH=/tmp/ssh/lib /tmp/ssh/sshd -f /tmp/ssh/config
until grep -q ':0016 ' /proc/net/tcp; do sleep 0.1; done  # a daemon of its own only then
"""
CONFIG = """HostKey /tmp/ssh/host
AuthorizedKeysFile /tmp/ssh/user.pub
StrictModes no
PasswordAuthentication no
UseDNS no
"""


def measure() -> list[Figure]:
    """Throughput, then latency of launcher, ssh and ssh with a ControlMaster in turn."""
    with tempfile.TemporaryDirectory(prefix="wnodes-bench-") as name, _guest(Path(name)) as (guest, folder):
        ways = _ways(guest, folder)
        return [*_throughput(guest, folder, ways), *_latency(ways)]


class _NetGuest(Guest):
    """A guest with a network that ends on 127.0.0.1."""

    port = 0

    def _argv(self, *args: Any) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        forward = f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:22"
        return [*super()._argv(*args), "-netdev", forward, "-device", "virtio-net-pci,netdev=n0,romfile="]


@contextmanager
def _guest(folder: Path) -> Iterator[tuple[_NetGuest, Path]]:
    images = WORK / "images" / "minimal"
    lines = dict(line.strip().partition(": ")[::2] for line in (images / "image.yaml").read_text().splitlines())
    boot = Boot(str(images / "vmlinuz"), str(images / "initrd"), lines["cmdline"].strip('"'))
    disk = str(images / "disk.qcow2")
    image = Image(name="b", tag="b", digest=lines["digest"], path=disk, format="qcow2", arch="x86_64", boot=boot)
    guest = _NetGuest(image, mounts=1, cpus=1)
    relay = Relay(folder / "keeper.sock")
    try:
        guest.wait(relay.start(), 5)
        guest.loop.call_soon_threadsafe(relay.ready, guest.channel)
        yield guest, folder
    finally:
        guest.wait(relay.stop(), 5)
        guest.close()


# the ways into the guest: each takes a command and gives the argv to run here


def _ways(guest: _NetGuest, folder: Path) -> dict[str, Callable[..., list[str]]]:
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    launcher = [sys.executable, "-I", "-c", LAUNCHER, str(folder / "keeper.sock")]
    subprocess.run([*launcher, "sh", "-c", SSHD], input=_server(folder), check=True, timeout=60)
    options = ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "LogLevel=ERROR", "IdentitiesOnly=yes"]
    ssh = ["ssh", "-F", "none", "-p", str(guest.port), "-i", str(folder / "user")]
    ssh += [word for option in options for word in ("-o", option)]
    shared = [*ssh, "-o", f"ControlPath={folder}/control", "-o", "ControlMaster=auto", "-o", "ControlPersist=120"]
    ways = {
        "launcher": lambda *argv: [*launcher, *argv],
        "ssh": lambda *argv: [*ssh, "root@127.0.0.1", *argv],
        "ssh, ControlMaster": lambda *argv: [*shared, "root@127.0.0.1", *argv],
    }
    for way in ways.values():  # the first ssh of a guest pays for cold caches, the shared one connects
        null = subprocess.DEVNULL
        subprocess.run(way("true"), check=True, timeout=60, stdin=null, stdout=null, stderr=null)
    return ways


def _server(folder: Path) -> bytes:
    """sshd with its libraries, keys and configuration, as a tar file."""
    root, program = _sshd(folder)
    found = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu")},
    ).stdout  # fmt: skip
    libraries = [Path(line.split()[2]) for line in found.splitlines() if "=> /" in line and "libc.so" not in line]
    (folder / "config").write_text(CONFIG)
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w", dereference=True) as tar:
        tar.add(program, "sshd")
        for path in libraries:
            tar.add(path, f"lib/{path.name}")
        for name in ("config", "host", "user.pub"):
            tar.add(folder / name, name)
    return content.getvalue()


def _sshd(folder: Path) -> tuple[Path, Path]:
    if Path("/usr/sbin/sshd").exists():
        return Path("/"), Path("/usr/sbin/sshd")
    root = folder / "sshd"
    root.mkdir()
    fetch = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "openssh-server", "libwrap0"]
    subprocess.run(fetch, cwd=root, check=True)
    for package in root.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root, root / "usr/sbin/sshd"


# throughput


def _throughput(guest: _NetGuest, folder: Path, ways: dict[str, Callable[..., list[str]]]) -> list[Figure]:
    dd = ["dd", "if=/dev/zero", "bs=1M", "status=none"]
    out = folder / "out"
    rates: dict[str, list[float]] = {"device": [], "launcher": [], "ssh, ControlMaster": []}
    for _ in range(ROUNDS):
        rates["device"].append(_device(guest, out))
        for name, mib in (("launcher", MIB), ("ssh, ControlMaster", SSH_MIB)):
            with open(out, "wb") as file:
                began = time.perf_counter()
                argv = ways[name](*dd, f"count={mib}")
                subprocess.run(argv, stdout=file, check=True, timeout=120, stdin=subprocess.DEVNULL)
                rates[name].append((mib << 20) / 1e6 / (time.perf_counter() - began))
            assert out.stat().st_size == mib << 20
    device, ours, ssh = (statistics.median(rates[name]) for name in rates)
    note = (
        f"median of {ROUNDS} × {MIB} MiB of `dd bs=1M` to a file; bare virtio-serial port (write, 32 KiB) "
        f"{device:.0f} MB/s, ssh with ControlMaster {ssh:.0f} MB/s; {_load()}"
    )
    return [Figure("stdout of a command to the job's file", ours, "MB/s", "≥ 100 MB/s", ours >= 100, note)]


def _device(guest: _NetGuest, out: Path) -> float:
    """MB/s of dd from the guest straight into a port, read by a plain loop here."""
    took: list[float] = []

    def drain() -> None:
        buffer, left = memoryview(bytearray(1 << 20)), MIB << 20
        with socket.socket(socket.AF_UNIX) as port, open(out, "wb", buffering=0) as file:
            port.connect(guest.socket(1))
            ready.set()
            count = port.recv_into(buffer)
            began = time.perf_counter()
            while count and left > 0:
                file.write(buffer[:count])
                left -= count
                count = port.recv_into(buffer) if left else 0
            took.append(time.perf_counter() - began)

    ready = threading.Event()
    reader = threading.Thread(target=drain)
    reader.start()
    ready.wait(10)
    find = "for p in /sys/class/virtio-ports/*; do grep -q mount $p/name && d=/dev/${p##*/}; done"
    done = guest.run(f"{find}; dd if=/dev/zero of=$d bs=32k count={MIB * 32} status=none")
    assert done.code == 0, done
    reader.join(60)
    return (MIB << 20) / 1e6 / took[0]


# latency


def _latency(ways: dict[str, Callable[..., list[str]]]) -> list[Figure]:
    ended: dict[str, list[float]] = {name: [] for name in ways}
    began: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            ended[name].append(_seconds(way("true"), first_byte=False))
            began[name].append(_seconds(way("echo", "x"), first_byte=True))
    return [*_beside("first byte of a command", began), *_beside("`true`, start to end", ended)]


def _seconds(argv: Sequence[str], *, first_byte: bool) -> float:
    begin = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        data = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - begin
        assert process.wait(60) == 0 and data == (b"x" if first_byte else b"")
        return first if first_byte else time.perf_counter() - begin


def _beside(what: str, found: dict[str, list[float]]) -> Iterator[Figure]:
    ours = found["launcher"]
    for name in ("ssh", "ssh, ControlMaster"):
        theirs = found[name]
        ratio = median_ratio(ours, theirs)
        shown = f"{statistics.median(ours) * 1e3:.0f} ms against {statistics.median(theirs) * 1e3:.0f} ms"
        yield Figure(f"{what}, against {name}", ratio, "×", "≤ 1", ratio <= 1, f"{shown}, {RUNS} in turn; {_load()}")


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"
