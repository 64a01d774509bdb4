"""Where the lease tests play: a user, folders of the user's own, ``wnodes`` itself, what is left."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from wnodes_core import processes
from wnodes_core.model import Process

sys.path.insert(0, str(Path(__file__).parent.parent))
from guests import LOCK  # noqa: E402

HERE = Path(__file__).parent
PATIENCE_S = 15.0
WNODES = Path(sys.executable).parent / "wnodes"  # the interpreter's own, not another on the path
LIFE = [
    *("making disk", "made disk", "making vm", "made vm", "making attachment", "made attachment"),
    *("gone attachment", "gone vm", "gone disk"),
]
RUNNING = LIFE.index("made attachment") + 1  # the command starts after this line, and ends before the next


def until(true, what, patience_s=PATIENCE_S):
    """Wait for something that no event announces."""
    deadline = time.monotonic() + patience_s
    while not (value := true()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.02)
    return value


class Stage:
    """One user's home, image store and folder of leases; all of it is removed at the end."""

    def __init__(self, user: pwd.struct_passwd) -> None:
        self.user = user
        # Short, and not below pytest's folders, which are private: names of sockets have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="wnt-", dir="/var/tmp"))
        self.home = self.folder / "home"
        self.leases = self.folder / "l"
        for path in (self.home, self.home / "work"):
            path.mkdir()
        self.work = self.home / "work"
        for path in (self.folder, self.home, self.work):
            os.chown(path, user.pw_uid, user.pw_gid)
        self.number = 0
        self.groups: tuple[int, ...] = ()  # beyond the user's own

    def become(self):
        """Arguments of Popen that make a child the user's."""
        if os.getuid() == self.user.pw_uid:
            return {}
        groups = {*os.getgrouplist(self.user.pw_name, self.user.pw_gid), *self.groups}
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": sorted(groups)}

    def environ(self, **more):
        words = {"HOME": str(self.home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
        return words | {key: str(value) for key, value in more.items()}

    def start(self, *argv, cwd=None, environ=None, **more):
        """A process of the user's; stdout and stderr are pipes unless said otherwise."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        argv = [os.fspath(word) for word in argv]
        return subprocess.Popen(
            argv, cwd=cwd or self.work, env=environ or self.environ(), umask=0o022, **self.become(), **streams
        )

    def run(self, *argv, timeout_s=60, stdin=b"", check=True, **more):
        """Run a process of the user's to its end."""
        process = self.start(*argv, stdin=subprocess.PIPE, **more)
        with process:
            out, err = process.communicate(stdin, timeout=timeout_s)
        done = subprocess.CompletedProcess(argv, process.returncode, out, err)
        assert not check or not done.returncode, err.decode(errors="replace")
        return done

    # the play with a journal that kills

    def orders(self, **orders):
        """Write orders for ``crash_main.py``; their file and the ledger's."""
        self.number += 1
        path, ledger = self.folder / f"orders{self.number}", self.folder / f"ledger{self.number}"
        ledger.touch()
        os.chown(ledger, self.user.pw_uid, self.user.pw_gid)
        base = {"root": str(self.leases), "ledger": str(ledger), "fake": True}
        base |= {"victim": "", "line": 0, "when": "after", "delay_s": 0}
        path.write_text(json.dumps(base | orders))
        return path, ledger

    def play(self, orders, *words):
        """argv of ``wnodes WORDS`` under orders."""
        return [sys.executable, "-I", str(HERE / "crash_main.py"), str(orders), *words]

    def kill(self, ledger, kind, wanted=True):
        """kill -9 of one of the ledger's processes."""
        for found, process in processes_in(ledger):
            if found == kind and wanted:
                assert processes.kill(process)

    def sweep(self, **orders):
        """What the next ``wnodes run`` does first."""
        return self.run(*self.play(self.orders(**orders)[0], "sweep"))

    # what is left

    def lease_folders(self):
        """The folders of leases as they are now."""
        return list(self.leases.glob("local-*"))

    def left(self, ledger=None):
        """Everything that a lease should have taken with it: [] is what is wanted."""
        found = [f"{kind} {p.pid}" for kind, p in processes_in(ledger) if processes.alive(p)]
        mark = str(self.leases)
        found += [f"process {p.pid}: {' '.join(p.command)[:200]}" for p in processes.table() if concerns(p, mark)]
        found += map(str, self.lease_folders())
        for name, table in (("mount", "/proc/self/mountinfo"), ("socket", "/proc/net/unix")):
            found += [f"{name}: {line}" for line in Path(table).read_text().splitlines() if mark in line]
        return found

    def wait_for_nothing(self, ledger=None, patience_s=PATIENCE_S):
        """Wait until nothing is left; fail with what is."""
        deadline = time.monotonic() + patience_s
        while (found := self.left(ledger)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not found, "\n".join(found)

    def close(self):
        """End what a failed test has left, by its pid, and remove the folders."""
        for process in processes.table():
            if concerns(process, str(self.folder)):
                processes.kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def concerns(process, mark):
    """Whether a living process names the folder in its argv or works in it."""
    try:
        cwd = os.readlink(f"/proc/{process.pid}/cwd")
    except OSError:
        cwd = ""
    return (mark in cwd or any(mark in word for word in process.command)) and processes.alive(process)


def processes_in(ledger):
    """The processes that a ledger names."""
    for entry in entries(ledger):
        if "process" in entry:
            yield entry["process"], Process(entry["pid"], 0, 0, entry["started"], "", ())


def lines_in(ledger):
    """The journal lines that a ledger names, in order."""
    return [entry["line"] for entry in entries(ledger) if "line" in entry]


def entries(ledger):
    return [json.loads(line) for line in Path(ledger).read_text().splitlines()] if ledger else []


def fake_images(stage):
    """Images for the fake backend, one for each fault, in the user's own store."""
    disk, kernel = stage.home / "zeros.raw", stage.home / "kernel"
    disk.write_bytes(bytes(1 << 20))
    kernel.write_bytes(b"not booted by a fake")
    for name in ("good", "panics", "never-boots", "cut-channel", "slow", "dies"):
        given = ["--format", "raw", "--kernel", kernel, "--cmdline", f"console=ttyS0 fault={name}"]
        stage.run(WNODES, "image", "add", "-q", *given, name, disk)


@pytest.fixture(name="stage", scope="module")
def stage_fixture(ordinary_user):
    stage = Stage(ordinary_user)
    yield stage
    stage.close()


@pytest.fixture(scope="module", name="real_image")
def real_image_fixture(stage, minimal_image):
    """The small guest in the user's store; while it is wanted no other test boots one."""
    boot = minimal_image.boot
    kernel = ["--kernel", boot.kernel, "--initrd", boot.initrd, "--cmdline", boot.cmdline]
    stage.run(WNODES, "image", "add", "-q", *kernel, "real", minimal_image.path)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield "real"
