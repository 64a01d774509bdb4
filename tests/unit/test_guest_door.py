"""The guest's door to the host: who comes in, and what becomes of the fds of a caller that runs as another account."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.guest import frames, guest_users
from wnodes_core.guest.guest_door import Door

JOBS = 4321


class Link:
    """What goes to the host."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)


@pytest.fixture
def door() -> Iterator[Any]:
    folder = tempfile.mkdtemp(prefix="wnodes-door-")
    os.chmod(folder, 0o755)
    made = Door(f"{folder}/host.sock", JOBS)
    yield made
    made.close()
    os.rmdir(folder)


def visit(door: Any, uid: int) -> None:
    """Connect as that user, and be served or not."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(door._path)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    door.serve(door.fds()[0], Link())


@pytest.mark.parametrize(("uid", "comes_in"), [(JOBS, True), (0, True), (12345, False), (JOBS + 1, False)])
def test_only_the_job_s_user_and_root_come_in(door: Any, uid: int, comes_in: bool) -> None:
    visit(door, uid)
    assert len(door.callers) == comes_in


def ask(door: Any, data: bytes, fds: list[int]) -> tuple[socket.socket, Link]:
    sock, link = socket.socket(socket.AF_UNIX), Link()
    sock.connect(door._path)
    door.serve(door.fds()[0], link)
    socket.send_fds(sock, [data], fds)
    for fd in list(door.callers):
        door.serve(fd, link)
    return sock, link


def test_the_fds_of_who_becomes_another_wait_for_the_command_and_no_other_process_inherits_them(door: Any) -> None:
    reader, writer = os.pipe()
    sock, link = ask(door, b'{"verb":"become","argv":[]}\n', [reader, writer, writer])
    (kind, _, _, stream, _), = [frames.HEADER.unpack(frame[: frames.HEAD]) for frame in link.sent]
    assert kind == frames.OPEN and stream & frames.GUEST_BIT
    fds = door.stdio_of(stream)
    assert len(fds) == 3 and all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    assert door.stdio_of(stream) == [-1, -1, -1], "once"
    os.write(fds[1], b"x")
    assert os.read(reader, 1) == b"x"
    with pytest.raises(ValueError):
        door.stdio_of(7)
    for fd in (*fds, reader, writer):
        os.close(fd)
    sock.close()


def test_a_request_longer_than_a_frame_may_be_ends_its_caller_and_not_the_channel(door: Any) -> None:
    sock, link = ask(door, b"{", [])
    sock.setblocking(False)
    left = frames.MAX_TO_HOST + 1
    while door.callers:
        left -= sock.send(b"x" * min(left, 60000)) if left > 0 else 0
        for fd in list(door.callers):
            door.serve(fd, link)
    assert not link.sent
    sock.close()


def test_groups_that_two_accounts_share_keep_both(tmp_path: Path) -> None:
    for name, uid in (("pilot", 1001), ("alice", 2001), ("alice", 2001)):
        user = {"name": name, "uid": uid, "gid": uid, "home": f"/home/{name}"}
        guest_users.add_user(user, [{"name": name, "gid": uid}, {"name": "vo", "gid": 900}], str(tmp_path))
    assert "vo:x:900:pilot,alice" in (tmp_path / "group").read_text().splitlines()
    assert [line.split(":")[0] for line in (tmp_path / "passwd").read_text().splitlines()] == ["pilot", "alice"]
