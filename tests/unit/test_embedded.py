"""The user's own leases without a daemon: what the sweep undoes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import embedded, processes
from wnodes_core.errors import HostError
from wnodes_core.files import private_folder
from wnodes_core.journal import Journal, Resource


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of leases instead of the user's."""
    monkeypatch.setattr(embedded, "leases_root", lambda: private_folder(tmp_path / "leases"))
    return embedded.leases_root()


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The resources that were undone, in order; one named ``stuck`` cannot be."""
    names: list[str] = []

    def undo_one(resource: Resource, hook: Any) -> None:
        if resource.name == "stuck":
            raise OSError("it sticks")
        names.append(resource.name)

    monkeypatch.setattr(embedded, "undo_one", undo_one)
    return names


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that may stand for a keeper."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def make_lease(pid: int, started: int, *names: str) -> Path:
    """A lease's folder with an open journal, as its keeper left it."""
    _, folder = embedded.new_lease()
    journal = Journal(Path(folder) / "journal")
    for name in names:
        journal.making("disk", name)
    journal.close()
    (Path(folder) / "lease.json").write_text(json.dumps({"keeper": {"pid": pid, "started": started}}))
    (Path(folder) / "libvirt").mkdir()
    return Path(folder)


def birth_of(pid: int) -> int:
    process = processes.read(pid)
    assert process is not None
    return process.started


def test_a_new_lease_has_a_private_folder_with_a_short_name(root: Path) -> None:
    lease, folder = embedded.new_lease()
    assert os.path.basename(folder) == lease
    assert len(lease) <= 32
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert embedded.new_lease()[0] != lease
    # libvirt and the ports have their sockets below it, and a socket's name has 107 bytes
    assert len(f"/var/tmp/wnodes-4294967294/{lease}/mount23.sock") < 107


def test_a_dead_keepers_lease_is_undone_newest_first(root: Path, undone: list[str]) -> None:
    folder = make_lease(2**22 + 1, 1, "old", "new")
    assert embedded.sweep() == []
    assert undone == ["new", "old"]
    assert not folder.exists()


def test_a_living_keepers_lease_is_not_touched(
    root: Path, undone: list[str], sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make_lease(sleeper.pid, birth_of(sleeper.pid), "disk")
    assert embedded.sweep() == []
    assert (undone, folder.exists()) == ([], True)
    sleeper.kill()
    sleeper.wait()
    assert embedded.sweep() == []
    assert (undone, folder.exists()) == (["disk"], False)


def test_a_keepers_pid_that_another_process_has_now_keeps_nothing(
    root: Path, undone: list[str], sleeper: subprocess.Popen[bytes]
) -> None:
    make_lease(sleeper.pid, birth_of(sleeper.pid) - 1, "disk")
    embedded.sweep()
    assert undone == ["disk"]
    assert sleeper.poll() is None


def test_a_folder_that_has_just_been_made_is_spared_for_a_minute(root: Path, undone: list[str]) -> None:
    folder = private_folder(root / "local-new")
    embedded.sweep()
    assert folder.exists()
    os.utime(folder, (time.time() - 61,) * 2)
    embedded.sweep()
    assert not folder.exists()


def test_a_launcher_that_waits_for_its_image_keeps_its_folder(root: Path, undone: list[str]) -> None:
    script = (
        "from pathlib import Path; import sys; from wnodes_core import embedded;"
        "embedded.leases_root = lambda: Path(sys.argv[1]); print(embedded.new_lease()[1], flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-I", "-c", script, str(root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        folder = Path(launcher.stdout.readline().strip())
        os.utime(folder, (time.time() - 3600,) * 2)
        embedded.sweep()
        assert folder.exists()
        launcher.kill()
    embedded.sweep()
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"keeper": {}}', '{"keeper": {"pid": "x", "started": 1}}'])
def test_an_unreadable_lease_is_a_dead_one(root: Path, undone: list[str], text: str) -> None:
    folder = make_lease(1, 1, "disk")
    (folder / "lease.json").write_text(text)
    assert embedded.sweep() == []
    assert (undone, folder.exists()) == (["disk"], False)


def test_what_cannot_be_undone_is_told_and_kept_for_the_next_time(
    root: Path, undone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_lease(2**22 + 1, 1, "first", "stuck", "last")
    other = make_lease(2**22 + 1, 1, "others")
    errors = embedded.sweep()
    assert [str(error) for error in errors] == ["it sticks"]
    assert sorted(undone) == ["first", "last", "others"]
    assert folder.exists()
    assert not other.exists()
    embedded.warn(errors)
    assert capsys.readouterr().err == "wnodes: warning: left behind: it sticks\n"
    undone.clear()
    embedded.sweep()
    assert undone == [], "what was undone is not undone again"


def test_a_folder_of_someone_elses_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "leases"
    foreign.mkdir(mode=0o700)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    if os.getuid() == 0:
        os.chown(foreign, 12345, 12345)
        with pytest.raises(HostError, match="want a folder of mode 0700 owned by uid 0, found uid 12345"):
            private_folder(foreign)
    for path in (open_to_all, link):
        with pytest.raises(HostError, match="want a folder of mode 0700"):
            private_folder(path)


def test_dot_folders_are_not_leases(root: Path, undone: list[str]) -> None:
    (root / ".probe").mkdir()
    os.utime(root / ".probe", (0, 0))
    embedded.sweep()
    assert (root / ".probe").exists()


def test_the_own_job_is_the_caller_here_and_now(root: Path) -> None:
    lease, _ = embedded.new_lease()
    job = embedded.own_job(lease, work_dir="/some/where")
    assert (job.lrms, job.uid, job.gid, job.work_dir) == ("local", os.getuid(), os.getgid(), "/some/where")
    assert job.job_id == lease.removeprefix("local-")
    assert job.cpus == job.memory_mib == 0


def test_waiting_for_a_killed_keeper_undoes_its_lease(root: Path, undone: list[str]) -> None:
    folder = make_lease(2**22 + 1, 1, "disk")
    keeper = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert embedded.wait_for_keeper(keeper.pid, str(folder)) == []
    assert (undone, folder.exists()) == (["disk"], False)
    keeper.returncode = -9  # it has been waited for behind Popen's back
