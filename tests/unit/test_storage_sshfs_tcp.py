"""sshfs over TCP without a guest: the real gateway, the guest's program, and strangers who are quicker."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import MountDenied, NoProvider
from wnodes_core.model import Mount
from wnodes_core.storage import sshfs_tcp, tcp_meet
from wnodes_core.tools import table

_NOBODY = 65534
USER = {"kind": "user", "node": "127.0.0.1", "routes": []}  # the guest's program runs on this very host
TAP = {"kind": "tap", "node": "127.0.0.1", "routes": [{"to": "127.0.0.1/32", "via": "", "source": "127.0.0.77"}]}
NICS = pytest.mark.parametrize("nic", [USER, TAP], ids=["guest calls", "node calls"])
# In sshfs's place: SFTP's greeting and back, then one file that lies where it may and one that does not.
CLIENT = """
import os, struct, sys
def ask(kind, body):
    os.write(1, struct.pack(">IB", len(body) + 1, kind) + body)
    size, kind = struct.unpack(">IB", os.read(0, 5))
    return kind, os.read(0, size - 1)
def opens(path):
    path = os.fsencode(path)
    return ask(3, struct.pack(">II", 7, len(path)) + path + struct.pack(">II", 1, 0))[0] == 102
answers = [ask(1, struct.pack(">I", 3))[0] == 2, *(opens(path) for path in sys.argv[1:])]
sys.stderr.write(repr(answers))
"""


class Served:
    """A mount whose guest is a program of this host's; ``enter`` runs it to its end."""

    def __init__(self, source: Path, nic: dict[str, Any]) -> None:
        guest = {"port": "org.wnodes.mount.3", "sshfs": True, "fuse": True, "nic": nic}
        made = sshfs_tcp.wnodes_mount_attach(Mount(str(source), "/t"), "/nowhere", guest, "sshfs-tcp")
        assert made is not None
        self.made = made
        self.pid: int = made["process"]["pid"]
        (step,) = made["guest"]
        assert "port" not in step
        self.words = step["argv"][:10]
        assert step["argv"][10] == "sshfs"
        self.address, self.number = self.words[5], int(self.words[6])
        self.first, self.second = (bytes.fromhex(each) for each in self.words[7:9])

    def start(self, *paths: object) -> subprocess.Popen[str]:
        program = [sys.executable, "-I", "-c", CLIENT, *map(str, paths)]
        argv = [*self.words, *program]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def enter(self, *paths: object) -> str:
        with self.start(*paths) as client:
            return str(client.communicate(timeout=30)[1])


Serve = Callable[[dict[str, Any]], Served]


@pytest.fixture
def serve(source: Path) -> Iterator[Serve]:
    made = []

    def start(nic: dict[str, Any]) -> Served:
        made.append(Served(source, nic))
        return made[-1]

    yield start
    for each in made:
        assert sshfs_tcp.wnodes_mount_detach(each.made) is True
        assert not os.path.exists(f"/proc/{each.pid}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/mine").write_text("mine")
    (tmp_path / "outside").write_text("secret")
    return tmp_path / "source"


def stranger(address: str, number: int, says: bytes = b"", *, source: str = "") -> Any:
    """Another user's process that is connected and goes no more; its answer is what it heard."""
    program = f"""
import os, socket, sys, time
os.setgroups([]), os.setgid({_NOBODY}), os.setuid({_NOBODY})
end = time.monotonic() + 10
while True:
    peer = socket.socket()
    try:
        {f'peer.setsockopt(0, 15, 1), peer.bind(("{source}", 0))' if source else "pass"}
        peer.connect(("{address}", {number}))
        break
    except OSError as error:
        if time.monotonic() > end:
            raise
        time.sleep(0.02)
peer.sendall({says!r})
print("connected", flush=True)
peer.settimeout(10)
try:
    print(peer.recv(100))
except OSError as error:
    print(type(error).__name__)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process


def heard(process: Any) -> str:
    with process:
        return str(process.communicate(timeout=30)[0]).strip()


@NICS
def test_the_guest_gets_its_folder_and_nothing_beside_it(serve: Serve, nic: dict[str, Any], source: Path) -> None:
    said = serve(nic).enter(source / "mine", source / "../outside", "/etc/shadow")
    assert said == "[True, True, False, False]"


@NICS
@pytest.mark.parametrize("says", [b"", b"\0\0\0\5\1\0\0\0\3", bytes(32), bytes(100)], ids=["nothing", "SFTP", "32", "100"])
def test_another_user_who_is_there_first_gets_nothing_and_takes_nothing(
    serve: Serve, nic: dict[str, Any], source: Path, says: bytes
) -> None:
    served = serve(nic)
    if nic is TAP:  # the guest waits: the stranger must come before the node, which is held for so long
        os.kill(served.pid, 19)
        client = served.start(source / "mine")
    with stranger(served.address, served.number, says) as other:
        assert other.stdout.readline() == "connected\n"
        time.sleep(0.2)
        if nic is TAP:
            os.kill(served.pid, 18)
            with client:
                said = client.communicate(timeout=30)[1]
        else:
            said = served.enter(source / "mine")
        assert said == "[True, True]"
        assert other.stdout.read() in ("b''\n", "ConnectionResetError\n")


@pytest.mark.parametrize("known", range(1, 33, 6))
def test_a_secret_cannot_be_guessed_byte_by_byte(serve: Serve, known: int) -> None:
    served = serve(USER)
    right = served.first[:known]
    wrong = bytes([right[0] ^ 1]) + right[1:]
    for said in (right, wrong):
        with socket.create_connection((served.address, served.number)) as peer:
            peer.sendall(said)
            peer.settimeout(0.3)
            with pytest.raises(TimeoutError):
                peer.recv(1)


def test_many_silent_strangers_do_not_keep_the_guest_out(serve: Serve, source: Path) -> None:
    served = serve(USER)
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (100, 100))
    crowd = [socket.create_connection((served.address, served.number), 5) for _ in range(200)]
    assert served.enter(source / "mine") == "[True, True]"
    for each in crowd:
        each.close()


def test_nobody_takes_the_place_of_a_gateway_that_died(serve: Serve) -> None:
    served = serve(USER)
    assert sshfs_tcp.wnodes_mount_detach(served.made) is True
    with tcp_meet.listen(served.address, served.number) as listener:
        client = served.start()
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(100) == served.first
            peer.sendall(bytes(32))
        with client:
            said = client.communicate(timeout=30)[1]
    assert said.strip() == f"mount over TCP: 127.0.0.1:{served.number} is somebody else"


def test_once_the_guest_is_served_there_is_no_port_any_more(serve: Serve, source: Path) -> None:
    served = serve(USER)
    assert served.enter(source / "mine") == "[True, True]"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((served.address, served.number), 5)


@NICS
def test_a_guest_that_never_comes_ends_the_gateway(
    serve: Serve, nic: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sshfs_tcp, "_PATIENCE_S", 0.5)
    served = serve(nic)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{served.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _argv(pid: int) -> bytes:
    with suppress(OSError):  # it has ended meanwhile
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@NICS
def test_its_secrets_are_in_no_argv_of_the_host_and_not_in_the_journal(serve: Serve, nic: dict[str, Any]) -> None:
    served = serve(nic)
    argv = b"".join(_argv(process.pid) for process in table())
    kept = {key: value for key, value in served.made.items() if key != "guest"}  # what the journal is told
    for secret in (served.first.hex(), served.second.hex()):
        assert secret not in str(kept)
        assert secret.encode() not in argv


@pytest.mark.parametrize("nic", [None, {"kind": "pci", "node": "", "routes": []}, {**TAP, "routes": []}])
def test_without_a_way_between_vm_and_node_another_provider_serves(source: Path, nic: Any) -> None:
    guest = {"port": "org.wnodes.mount.0", "sshfs": True, "fuse": True, "nic": nic}
    with pytest.raises(NoProvider):
        sshfs_tcp.wnodes_mount_attach(Mount(str(source), "/t"), "/nowhere", guest, "sshfs-tcp")


def test_a_source_that_vanished_is_denied(source: Path) -> None:
    with pytest.raises(MountDenied):
        sshfs_tcp.wnodes_mount_attach(Mount(f"{source}/gone", "/t"), "/nowhere", {"nic": USER}, "sshfs-tcp")
