"""Reading a file of a user's as root: no link, pipe, device or file system of theirs is followed or waited for."""

import os
import socket

import pytest

from wnodes_core.files import read_beneath


def test_a_regular_file_is_read_up_to_the_limit(tmp_path):
    (tmp_path / "ad").write_bytes(b"x" * 100)
    assert read_beneath(tmp_path, "ad", limit=10) == b"x" * 10


def test_nothing_else_is(tmp_path):
    (tmp_path / "real").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        for name in ("link", "up/x", "pipe", "socket", "../" + tmp_path.name + "/real", "/etc/passwd", "missing", "."):
            with pytest.raises(OSError):  # noqa: PT011 - each has an errno of its own
                read_beneath(tmp_path, name, limit=10)


def test_no_mount_is_crossed():
    with pytest.raises(OSError, match=r"cross-device|Invalid"):
        read_beneath("/", "proc/version", limit=10)
