"""A hostile user with an account on the node: what wnodesd reads of them, and keeps for them, is bounded."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest

from wnodes_core import command, files, journal, processes
from wnodes_core.agent import ending
from wnodes_core.errors import CommandError
from wnodes_core.images import use
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


@pytest.fixture
def place():
    """A root-owned folder that any user may reach, as the parent of the lease folders is."""
    with tempfile.TemporaryDirectory(prefix="wnodes-attack-") as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


def grown(folder: Path, depth: int) -> None:
    """A tree deeper than Python's stack, and links out of it, of user 12345 where we are root."""
    script = "import os\nfor _ in range(%d): os.mkdir('d'); os.symlink('%s', 'l'); os.chdir('d')"
    argv = ["/usr/bin/python3", "-I", "-c", script % (depth, folder.parent / "precious")]
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        argv = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--", *argv]
    subprocess.run(argv, cwd=folder, check=True)


def test_a_lease_folder_deeper_than_our_stack_is_removed_and_no_link_followed(place):
    (place / "precious").mkdir()
    (place / "precious" / "file").touch()
    grown(place / "lease", 2000)
    ending.remove_folder(str(place / "lease"))
    ending.remove_folder(str(place / "lease"))  # gone already
    assert [path.name for path in place.iterdir()] == ["precious"]
    assert (place / "precious" / "file").exists()


def test_a_lease_folder_is_emptied_with_its_owners_rights(place, mocker):
    grown(place / "lease", 1)
    run = mocker.spy(command, "run")
    ending.remove_folder(str(place / "lease"))
    expected = (12345, 12345, ()) if os.geteuid() == 0 else None
    assert [call.kwargs["become"] for call in run.call_args_list] == [expected]


def test_a_tree_that_we_cannot_walk_is_an_error_that_sweepers_expect(place):
    grown(place / "lease", 2000)
    with pytest.raises(OSError, match="nested too deeply"):
        files.remove_tree(place / "lease")
    subprocess.run(["rm", "-rf", place / "lease"], check=True)


def test_a_program_that_prints_for_ever_is_ended_before_it_fills_our_memory():
    tracemalloc.start()
    with pytest.raises(CommandError, match="printed more than"):
        command.run(["yes"], timeout_s=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * command.MAX_OUTPUT


def test_a_program_whose_children_hold_its_output_open_is_not_waited_for():
    with pytest.raises(CommandError, match="no answer within"):
        command.run(["/bin/sh", "-c", "exec 9>&2; sleep 3 & exit 0"], timeout_s=0.3)


def test_another_reader_of_an_image_who_locks_it_keeps_nobody_waiting(tmp_path):
    image = tmp_path / "image"
    image.touch()
    with image.open() as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        began = time.monotonic()
        with use.hold(image):
            assert time.monotonic() - began < 2
