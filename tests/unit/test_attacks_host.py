"""A hostile user with an account on the node: what wnodesd reads of them, and keeps for them, is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import tracemalloc

import pytest

from wnodes_core import journal, processes
from wnodes_core.journal import Journal


def test_a_huge_command_line_costs_its_reader_next_to_nothing():
    argv = ["/bin/sleep", *["9000"], *["00"] * 30000]  # sleep(1) adds them up
    with subprocess.Popen(argv) as child:
        try:
            while not (found := processes.read(child.pid)) or found.command[:1] != ("/bin/sleep",):
                pass  # between fork and exec
            tracemalloc.start()
            found = processes.read(child.pid)
            size = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
        finally:
            child.kill()
    assert found and found.command[:2] == ("/bin/sleep", "9000")
    assert size < 100 << 10  # 30,000 words would be 1.8 MiB


def test_nobody_asks_a_users_process_for_its_command_line_to_know_its_ancestry():
    chain = list(processes.ancestry(os.getpid(), command_of_users=False))
    assert all(process.command == ("",) for process in chain if process.uid)
    assert any(process.command != ("",) for process in chain if not process.uid)


def test_noting_the_same_facts_for_ever_does_not_grow_the_journal(tmp_path):
    path = tmp_path / "journal"
    noted = Journal(path)
    marker = noted.making("marker", "/run/x")
    record = noted.making("lease", "l")
    for number in range(60):
        record = noted.made(record, number=number, filler="x" * 60000)
    noted.gone(marker)
    assert os.path.getsize(path) <= journal.COMPACT_BYTES
    assert [(r.kind, r.data.get("number")) for r in journal.read(path)] == [("lease", 59)]
    assert path.stat().st_mode & 0o777 == 0o600
    again = Journal(path)
    again.gone(record)
    assert journal.read(path) == []


def test_a_journal_that_is_a_fifo_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / "journal")
    with pytest.raises(OSError, match="No such device"):
        Journal(tmp_path / "journal")


def test_a_journal_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "aim").write_text(json.dumps({"op": "made", "kind": "disk", "name": "/", "data": {}}))
    os.symlink(tmp_path / "aim", tmp_path / "journal")
    with pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path / "journal")
