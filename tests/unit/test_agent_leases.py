"""What a lease keeps on disk is enough to find it again; names from outside are checked."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from wnodes_core.agent import ending, leases, words
from wnodes_core.agent.leases import State
from wnodes_core.errors import BadRequest, WnodesError
from wnodes_core.journal import Journal
from wnodes_core.model import Job, Owner, Process, VmRequest

JOB = Job("slurm", "12", "n0", os.getuid(), os.getgid(), "me", cpus=2, work_dir="/home/me")


@pytest.fixture
def places(tmp_path):
    leases.folders(f"{tmp_path}/state", f"{tmp_path}/run")
    return f"{tmp_path}/state", f"{tmp_path}/run"


@pytest.fixture
def lease(places):
    lease = leases.create(JOB, VmRequest("el9"), *places, Journal)
    yield lease
    if Path(lease.journal.path).exists():
        lease.journal.close()


class Store:
    def __init__(self):
        self.released = []

    def release(self, lease):
        self.released.append(lease)


def test_a_lease_is_found_again_as_it_was(lease):
    process = Process(5, 1, 0, 77, "/x", ("a", "b"))
    lease.state, lease.keeper, lease.root = State.RUNNING, process, process
    lease.owner = Owner("12", "batch", process, True, "n0")
    token = lease.new_token()
    lease.save()
    again = leases.load(lease.journal.path, Journal)
    assert again is not None
    again.journal.close()
    assert again.facts() == lease.facts()
    assert again.token_fits(token)
    assert token not in Path(lease.journal.path).read_text()


def test_no_token_fits_before_one_was_given(lease):
    assert not lease.token_fits("")
    assert not lease.token_fits(None)


def test_a_journal_without_a_line_is_removed(places):
    path = Path(places[0], "journal", "x.jsonl")
    path.write_bytes(b'\n{"op": "maki')
    assert leases.load(path, Journal) is None
    assert not path.exists()


def test_ids_are_short_unique_and_show_the_job():
    ids = {leases.new_id(replace(JOB, node="a-very-long-name.of.a.node", job_id="123456")) for _ in range(50)}
    assert len(ids) == 50
    assert all(len(each) <= leases.ID_MAX for each in ids)
    assert leases.new_id(JOB).startswith("slurm-n0-12-")


@pytest.mark.parametrize("word", ["", ".", "../x", "a/b", "a b", "x" * 65, None, 7, "a\n"])
def test_words_that_become_file_names_are_checked(word):
    with pytest.raises(BadRequest, match="node"):
        words.check_word("node", word)


@pytest.mark.parametrize("data", [None, [], {"image": "x", "mounts": [{"a": 1}]}, {"nix": 1}, {"mounts": 5}])
def test_odd_requests_are_refused(data):
    with pytest.raises(BadRequest, match="request"):
        words.request_of(data)


def test_undoing_goes_on_after_a_failure_and_again_later(lease):
    def broken(lease):
        raise WnodesError("resists")

    store = Store()
    lease.journal.making("keeper", lease.id)
    lease.journal.making("use", lease.id)
    errors = ending.Undoer(store, broken).undo(lease, job_over=True)
    assert [e.__notes__[0].rsplit(" ", 1)[0] for e in errors] == ["while undoing keeper", "while undoing folder"]
    assert store.released == [lease.id]
    assert not Path(lease.marker).exists()
    assert Path(lease.folder).exists()  # the user's journal is still needed
    assert Path(lease.journal.path).exists()
    assert ending.Undoer(store, lambda lease: None).undo(lease, job_over=True) == []
    assert not Path(lease.folder).exists()
    assert not Path(lease.journal.path).exists()


def test_a_user_cannot_keep_a_lease_folder_for_ever(lease):
    def broken(lease):
        raise WnodesError("resists")

    lease.journal.making("keeper", lease.id)
    lease.tries = ending.PATIENCE
    ending.Undoer(Store(), broken).undo(lease, job_over=True)
    assert not Path(lease.folder).exists()


def test_until_the_job_is_over_its_marker_and_record_stay(lease):
    undoer = ending.Undoer(Store(), lambda lease: None)
    assert undoer.undo(lease, job_over=False) == []
    assert [r.kind for r in lease.journal.open_resources] == ["marker", "lease"]
    assert Path(lease.marker).read_text() == f"{lease.id}\n"
    assert not Path(lease.folder).exists()


def test_half_a_marker_of_a_killed_daemon_goes_with_the_whole(lease):
    marker = Path(lease.marker)
    halves = [marker.with_name(f".{marker.name}.{end}") for end in ("123.0badcafe", "124.0badcafe")]
    for half in halves:
        half.write_text("")
    leases.remove_marker(lease)
    assert list(marker.parent.iterdir()) == []


def test_a_later_leases_marker_is_left_alone(lease):
    Path(lease.marker).write_text("another\n")
    leases.remove_marker(lease)
    assert Path(lease.marker).exists()
