"""The sshfs provider without a guest: a raw SFTP client on the gateway's socket."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import MountDenied
from wnodes_core.model import Mount
from wnodes_core.storage import bundle, confine, sshfs

GUEST = {"port": "org.wnodes.mount.0", "sshfs": True, "fuse": True}
OPEN, READ, REMOVE, MKDIR, RENAME, SYMLINK, STAT = 3, 5, 13, 14, 18, 20, 17
OK, DENIED, FAILURE, HANDLE, DATA, NO_FILE = 0, 3, 4, 102, 103, 2
FOR_READING, FOR_WRITING = 1, 2 | 8


class Sftp:
    """As much of the protocol as an attacker needs."""

    def __init__(self, sock: socket.socket) -> None:
        self.file = sock.makefile("rwb")
        self.send(1, struct.pack(">I", 3))
        assert self.receive()[0] == 2

    def send(self, kind: int, payload: bytes) -> None:
        self.file.write(struct.pack(">IB", len(payload) + 1, kind) + payload)
        self.file.flush()

    def receive(self) -> tuple[int, bytes]:
        length, kind = struct.unpack(">IB", self.file.read(5))
        return kind, self.file.read(length - 1)

    def ask(self, kind: int, *words: bytes, tail: bytes = b"") -> int:
        """A status code, or HANDLE for an opened file."""
        body = b"".join(struct.pack(">I", len(word)) + word for word in words)
        self.send(kind, struct.pack(">I", 7) + body + tail)
        answer, payload = self.receive()
        return int(struct.unpack_from(">I", payload, 4)[0]) if answer == 101 else answer

    def open(self, path: str, flags: int = FOR_READING) -> int:
        return self.ask(OPEN, os.fsencode(path), tail=struct.pack(">II", flags, 0))


Attach = Callable[..., Sftp]


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    """Attach a folder; the test plays the guest. Every gateway is gone afterwards."""
    made: list[dict[str, Any]] = []
    open_sockets: list[Any] = []

    def start(source: Path, *, read_only: bool = False) -> Sftp:
        path = str(tmp_path / f"port{len(made)}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            attachment = sshfs.wnodes_mount_attach(Mount(str(source), "/t", read_only), path, GUEST, "sshfs")
            assert attachment is not None
            made.append(attachment)
            guest_side, _ = listener.accept()
        open_sockets.append(guest_side)
        client = Sftp(guest_side)
        open_sockets.append(client.file)
        return client

    yield start
    for each in reversed(open_sockets):
        each.close()
    for attachment in made:
        assert sshfs.wnodes_mount_detach(attachment) is True
        assert sshfs.wnodes_mount_detach(attachment) is True, "detaching twice is no error"
        assert not os.path.exists(f"/proc/{attachment['process']['pid']}")
    assert sshfs.gateways() == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    return folder


def test_serves_what_is_beneath_the_source(attach: Attach, source: Path) -> None:
    client = attach(source)
    assert client.open(f"{source}/mine") == HANDLE
    assert client.open(f"{source}/new", FOR_WRITING) == HANDLE
    assert (source / "new").exists()


def test_umask_is_the_guests_business(attach: Attach, source: Path) -> None:
    client = attach(source)
    mode = struct.pack(">III", FOR_WRITING, 4, 0o666)  # attributes: permissions only
    assert client.ask(OPEN, os.fsencode(f"{source}/open"), tail=mode) == HANDLE
    assert (source / "open").stat().st_mode & 0o777 == 0o666


@pytest.mark.skipif(bool(confine.usable()), reason=confine.usable())
class TestConfinement:
    """A guest that speaks SFTP itself gets nothing beyond the source."""

    @pytest.mark.parametrize("path", ["{up}/outside", "{source}/../outside", "/etc/shadow", "/etc/hostname", "/proc/self/environ"])
    def test_outside_does_not_open(self, attach: Attach, source: Path, tmp_path: Path, path: str) -> None:
        assert attach(source).open(path.format(up=tmp_path, source=source)) in (DENIED, FAILURE)

    def test_a_symlink_out_does_not_open(self, attach: Attach, source: Path, tmp_path: Path) -> None:
        client = attach(source)
        assert client.ask(SYMLINK, os.fsencode(tmp_path / "outside"), os.fsencode(source / "door")) == OK
        assert client.open(f"{source}/door") == DENIED
        assert client.ask(SYMLINK, os.fsencode(tmp_path), os.fsencode(source / "folder")) == OK
        assert client.open(f"{source}/folder/outside") == DENIED

    def test_nothing_is_made_moved_or_removed_outside(self, attach: Attach, source: Path, tmp_path: Path) -> None:
        client = attach(source)
        assert client.open(f"{tmp_path}/elsewhere/new", FOR_WRITING) == DENIED
        assert client.ask(MKDIR, os.fsencode(tmp_path / "new"), tail=struct.pack(">I", 0)) == DENIED
        assert client.ask(REMOVE, os.fsencode(tmp_path / "outside")) == DENIED
        assert client.ask(RENAME, os.fsencode(source / "mine"), os.fsencode(tmp_path / "mine")) != OK
        assert (source / "mine").exists() and not (tmp_path / "mine").exists()
        assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == []

    def test_read_only_is_held_twice(self, attach: Attach, source: Path) -> None:
        client = attach(source, read_only=True)
        assert client.open(f"{source}/mine") == HANDLE
        assert client.open(f"{source}/new", FOR_WRITING) == DENIED
        assert client.ask(REMOVE, os.fsencode(source / "mine")) == DENIED
        assert (source / "mine").exists()

    def test_moves_between_folders_of_the_source_work(self, attach: Attach, source: Path) -> None:
        (source / "a").mkdir()
        client = attach(source)
        assert client.ask(RENAME, os.fsencode(source / "mine"), os.fsencode(source / "a/mine")) == OK


def test_without_landlock_the_notice_says_so(
    attach: Attach, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(confine, "abi", lambda: 0)
    assert attach(source).open(f"{source}/mine") == HANDLE
    assert "not confined" in caplog.text and "no Landlock" in caplog.text


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7, 99])
def test_attributes_fit_every_abi(version: int) -> None:
    assert len(confine._attributes(version)) == (8 if version < 4 else 16 if version < 6 else 24)
    assert len(confine._attributes(version, files_only=True)) == 8


def test_abi_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "abi", lambda: 1)
    assert "ABI 1" in confine.usable()


def test_source_that_is_no_folder_is_denied(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(MountDenied, match="want a folder you can read"):
            sshfs.wnodes_mount_attach(Mount(str(tmp_path / name), "/t"), "/nowhere", GUEST, "sshfs")


def test_another_providers_attachment_is_left_alone() -> None:
    assert sshfs.wnodes_mount_detach({"provider": "nfs"}) is None


def test_guest_with_sshfs_gets_no_bundle() -> None:
    (step,) = sshfs.guest_steps(Mount("/a b", "/c", True), GUEST)
    stage = "/run/wnodes/mounts/org.wnodes.mount.0"
    options = "passive,allow_other,idmap=none,dcache_timeout=1,fsname=wnodes,max_read=65536,max_write=65536"
    assert step == {
        "argv": ["sshfs", ":", stage, "-s", "-o", options],
        "port": "org.wnodes.mount.0",
        "mount": {"stage": stage, "target": "/c", "read_only": True, "read_ahead_kib": 4096},
        "timeout_s": 60.0,
    }


def test_an_sshfs_that_keeps_symlinks_in_is_told_not_to() -> None:
    (step,) = sshfs.guest_steps(Mount("/a", "/c"), {**GUEST, "sshfs_contains_symlinks": True})
    assert step["argv"][-1].endswith(",no_contain_symlinks")


def test_guest_without_sshfs_gets_the_hosts() -> None:
    (step,) = sshfs.guest_steps(Mount("/a", "/c"), {**GUEST, "sshfs": False})
    names = {file["path"].rpartition("/")[2] for file in step["files"]}
    assert {"sshfs", "loader", "libc.so.6", "libfuse3.so.3"} <= names
    assert sum(len(file["content"]) for file in step["files"]) < 12 << 20, "must fit one frame to the guest"
    assert step["argv"][:2] == [f"{bundle.FOLDER}/loader", "--library-path"]
    assert step["argv"][-1].endswith(",no_contain_symlinks") is bundle.knows(b"no_contain_symlinks")


def test_a_guest_without_fuse_loads_it_first() -> None:
    first, _ = sshfs.guest_steps(Mount("/a", "/c"), {**GUEST, "fuse": False})
    assert first == {"argv": ["modprobe", "fuse"]}
