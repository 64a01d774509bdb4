"""The journal: intent before effect, torn lines, undo that never stops half-way."""

import os

import pytest

from wnodes_core.errors import StateDirFull
from wnodes_core.journal import Journal, Resource, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def test_a_resource_is_open_from_intent_until_gone(path):
    journal = Journal(path)
    disk = journal.making("disk", "/o", size=1)
    assert read(path) == [Resource("disk", "/o", {"size": 1})]
    disk = journal.made(disk, device="vda")
    assert read(path) == [Resource("disk", "/o", {"size": 1, "device": "vda"})]
    journal.gone(disk)
    assert read(path) == []


def test_undo_runs_newest_first_and_goes_on_after_failures(path):
    journal = Journal(path)
    for name in ("a", "b", "c"):
        journal.making("disk", name)
    seen = []

    def undo(resource):
        seen.append(resource.name)
        if resource.name == "b":
            raise OSError("busy")

    errors = journal.undo(undo)
    assert seen == ["c", "b", "a"]
    assert [str(e) for e in errors] == ["busy"]
    assert errors[0].__notes__ == ["while undoing disk b"]
    assert [r.name for r in read(path)] == ["b"]


def test_a_body_that_fails_leaves_the_intent_open(path):
    journal = Journal(path)
    with pytest.raises(RuntimeError), journal.making_it("vm", "v"):
        raise RuntimeError
    assert [r.name for r in read(path)] == ["v"]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_torn_last_line_never_hides_what_came_before_or_after(path, cut):
    Journal(path).making("disk", "first")
    Journal(path).making("vm", "torn")
    os.truncate(path, path.stat().st_size - cut)
    journal = Journal(path)
    journal.making("vm", "later")
    names = [r.name for r in read(path)]
    assert names[0] == "first" and names[-1] == "later"
    assert set(names) <= {"first", "torn", "later"}


def test_garbage_lines_are_skipped(path):
    path.write_bytes(b'\xff\xfe\n{"op": 1}\n[]\nnull\n{"op":"made","kind":"disk","name":"x","data":{}}\n')
    assert read(path) == [Resource("disk", "x", {})]


def test_a_journal_is_never_followed_through_a_link(path, tmp_path):
    (tmp_path / "real").write_text("")
    path.symlink_to(tmp_path / "real")
    with pytest.raises(OSError):
        Journal(path)
    with pytest.raises(OSError):
        read(path)


def test_a_full_disk_is_a_host_error_and_the_effect_is_not_begun(path, mocker):
    journal = Journal(path)
    mocker.patch("os.write", side_effect=OSError(28, "No space left on device"))
    begun = False
    with pytest.raises(StateDirFull), journal.making_it("disk", "x"):
        begun = True
    assert not begun


def test_the_intent_is_on_disk_before_the_body_runs(path, mocker):
    synced = mocker.spy(os, "fdatasync")
    journal = Journal(path)
    with journal.making_it("disk", "x"):
        assert synced.call_count == 1
        assert [r.name for r in read(path)] == ["x"]
