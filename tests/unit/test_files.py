"""The file door: atomic, durable, and never through somebody's link."""

import os

import pytest

from wnodes_core import files
from wnodes_core.errors import HostError, StateDirFull


def test_write_atomic_replaces_whole_and_leaves_no_temporary(tmp_path):
    target = tmp_path / "f"
    files.write_atomic(target, b"one", mode=0o600)
    files.write_atomic(target, b"two", mode=0o640)
    assert target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["f"]


def test_a_failed_write_keeps_the_old_text_and_no_temporary(tmp_path, mocker):
    target = tmp_path / "f"
    files.write_atomic(target, b"old")
    mocker.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with pytest.raises(StateDirFull, match="No space left"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_write_atomic_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "f").symlink_to(tmp_path / "victim")
    files.write_atomic(tmp_path / "f", b"x")
    assert (tmp_path / "victim").read_text() == "safe"
    assert not (tmp_path / "f").is_symlink()


def test_private_folder_refuses_what_is_not_ours_alone(tmp_path):
    assert files.private_folder(tmp_path / "a") == tmp_path / "a"
    assert files.private_folder(tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.chmod(tmp_path / "a", 0o755)
    (tmp_path / "file").write_text("")
    for name in ("link", "a", "file"):
        with pytest.raises(HostError, match="want a folder of mode 0700"):
            files.private_folder(tmp_path / name)


def test_remove_tree_removes_links_and_spares_their_targets(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "keep").write_text("")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(victim)
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert (victim / "keep").exists() and not tree.exists()


def test_read_tail_reads_the_end_and_nothing_but_plain_files(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789\xff")
    assert files.read_tail(tmp_path / "f", 3) == "89�"
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "fifo")
    assert [files.read_tail(tmp_path / n, 3) for n in ("link", "fifo", "none")] == ["", "", ""]
