"""What is remembered, by whom, and for whom."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wnodes_core.backends.libvirt import memory


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be seen as an ordinary user (files still get our own uid)."""
    monkeypatch.setattr(memory, "shared_folder", lambda _state_dir: Path("/nonexistent"))


def keep(folder: Path, data: bytes = b"known", mode: int = 0o600, folder_mode: int = 0o700) -> None:
    mine = memory.user_folder(folder)
    mine.mkdir()
    (mine / "x").write_bytes(data)
    (mine / "x").chmod(mode)
    mine.chmod(folder_mode)


def test_remembered_is_recalled(tmp_path: Path) -> None:
    assert memory.recall("x", tmp_path, tmp_path) is None
    assert memory.remember("x", b"data", tmp_path, tmp_path)
    assert memory.recall("x", tmp_path, tmp_path) == b"data"


def test_own_file_is_believed(tmp_path: Path, user: None) -> None:
    keep(tmp_path)
    assert memory.recall("x", tmp_path, tmp_path) == b"known"


@pytest.mark.parametrize(("mode", "folder_mode"), [(0o666, 0o700), (0o620, 0o700), (0o600, 0o777), (0o600, 0o770)])
def test_what_others_may_write_is_not_believed(tmp_path: Path, user: None, mode: int, folder_mode: int) -> None:
    keep(tmp_path, mode=mode, folder_mode=folder_mode)
    assert memory.recall("x", tmp_path, tmp_path) is None


def test_links_are_not_followed(tmp_path: Path, user: None) -> None:
    keep(tmp_path)
    mine = memory.user_folder(tmp_path)
    (mine / "y").symlink_to(mine / "x")
    assert memory.recall("y", tmp_path, tmp_path) is None
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    assert memory.recall("x", tmp_path, tmp_path) is None


@pytest.mark.parametrize("owner", ["file", "folder"])
def test_another_owner_is_not_believed(tmp_path: Path, user: None, owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path)
    mine = memory.user_folder(tmp_path)
    path = mine / "x" if owner == "file" else mine
    inode, fstat = path.stat().st_ino, os.fstat

    def someone_elses(fd: int) -> os.stat_result:
        found = fstat(fd)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:10]]) if found.st_ino == inode else found

    monkeypatch.setattr(memory.os, "fstat", someone_elses)
    assert memory.recall("x", tmp_path, tmp_path) is None


def test_a_folder_taken_by_another_is_no_error(tmp_path: Path) -> None:
    for folder in (memory.user_folder(tmp_path), memory.shared_folder(tmp_path)):
        folder.write_text("not a folder")
    assert not memory.remember("x", b"data", tmp_path, tmp_path)
    assert memory.recall("x", tmp_path, tmp_path) is None
