"""What a template hangs on: each change of it is another template. And memory that nobody can alter."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.errors import ImageError
from wnodes_core.guest import bundle
from wnodes_core.model import Boot, Image
from wnodes_core.templates import sealed, wanted
from wnodes_core.templates.wanted import Wanted

IMAGE = Image("deb", "1", "sha256:" + "a" * 64, "/i/disk", "qcow2", boot=Boot("/i/vmlinuz", "/i/initrd", "quiet"))
WANTED = Wanted(IMAGE, "tcg", 1, 512, 4096, "qemu 1")


@pytest.mark.parametrize(
    "change",
    [
        {"accel": "kvm"},
        {"cpus": 2},
        {"base_mib": 256},
        {"most_mib": 8192},
        {"host": "qemu 2"},
        {"image": replace(IMAGE, digest="sha256:" + "b" * 64)},
        {"image": replace(IMAGE, boot=Boot("/i/vmlinuz", "/i/initrd", "debug"))},
        {"image": replace(IMAGE, boot=None)},
        {"image": replace(IMAGE, path="/j/disk")},
        {"image": replace(IMAGE, facts={"agent": "qemu-ga"})},
    ],
)
def test_whatever_changes_makes_it_another(change: dict[str, Any]) -> None:
    assert replace(WANTED, **change).id != WANTED.id


def test_a_tag_alone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replace(WANTED, image=replace(IMAGE, name="other", tag="2")).id == WANTED.id


def test_another_agent_makes_it_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = WANTED.id
    monkeypatch.setattr(bundle, "agent_digest", lambda: "another")
    assert WANTED.id != before


def test_its_name_fits_into_a_socket_path() -> None:
    assert len(WANTED.id) == wanted.ID_LENGTH


def test_without_a_backend_that_clones_there_is_none() -> None:
    hook = SimpleNamespace(wnodes_template_ways=lambda accel: [], wnodes_template_host=lambda accel: "x")
    assert Wanted.of(IMAGE, "tcg", 1, 512, hook) is None


def test_sealed_memory_is_the_file_and_nobody_writes_to_it(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    data = os.urandom(5000)
    with open(path, "wb") as file:
        file.seek(8 << 20)
        file.write(data)
        file.truncate(16 << 20)
    fd = sealed.load(str(path), "t")
    try:
        assert os.fstat(fd).st_size == 16 << 20
        assert os.pread(fd, 5000, 8 << 20) == data
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # as QEMU 7.2 does
        for harm in (
            lambda: os.pwrite(again, b"x", 0),
            lambda: os.ftruncate(again, 0),
            lambda: os.ftruncate(again, 32 << 20),
            lambda: mmap.mmap(again, 4096, mmap.MAP_SHARED),
        ):
            with pytest.raises(OSError):
                harm()
        with mmap.mmap(again, 4096, mmap.MAP_PRIVATE) as private:
            private[0] = 1
        assert os.pread(fd, 1, 0) == b"\0"
        os.close(again)
    finally:
        os.close(fd)


def test_a_memory_file_that_is_a_link_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ImageError):
        sealed.load(str(tmp_path / "link"), "t")
