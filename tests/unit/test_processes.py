"""The process table: ancestry, and identity that survives pid reuse."""

import os
import subprocess
import sys
from dataclasses import replace

from wnodes_core import command, processes


def sleeper(program=sys.executable):
    """A child past its exec: until the kernel has laid out its stack, a process has no command line to read."""
    child = command.spawn([program, "-I", "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    with child.stdout:
        assert child.stdout.readline() == b"\n"
    return child


def test_read_tells_parent_uid_and_command():
    child = sleeper()
    try:
        found = processes.read(child.pid)
        assert found and (found.parent, found.uid) == (os.getpid(), os.getuid())
        assert processes.alive(found)
        assert [p.pid for p in processes.ancestry(child.pid)][:2] == [child.pid, os.getpid()]
        assert found in list(processes.table())
    finally:
        assert processes.kill(processes.read(child.pid))
        child.wait()


def test_a_pid_that_came_back_as_another_process_is_not_killed():
    child = sleeper()
    try:
        old = replace(processes.read(child.pid), started=1)
        assert not processes.alive(old)
        assert processes.open_pidfd(old) is None
        assert processes.kill(old) is True
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_kill_of_a_dead_process_is_done():
    child = sleeper()
    found = processes.read(child.pid)
    child.kill()
    child.wait()
    assert processes.kill(found) and not processes.alive(found)
    assert processes.read(child.pid) is None


def test_a_name_with_brackets_and_blanks_is_read_rightly(tmp_path):
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to(sys.executable)
    child = sleeper(str(odd))
    try:
        assert processes.read(child.pid).parent == os.getpid()
    finally:
        child.kill()
        child.wait()
