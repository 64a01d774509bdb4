"""A real HTCondor on loopback in a folder of its own, for demo and tests: up in seconds, down without a trace.

``with Lab(folder) as lab: lab.run_as("alice", ["condor_submit", "job.sub"])``, or from a shell
``python -m wnodes_htcondor.lab up|write|start|down DIR``.
HTCondor itself comes from Debian packages, unpacked under a prefix and kept (debs.py). Besides that
prefix, the lab's folder and the account ``condor`` nothing is written. Without root it works too:
all daemons and jobs are then the caller's.
Contract read: condor_master(1), the configuration macros of HTCondor 23.9 and 25.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wnodes_core import tools
from wnodes_core.api import Process
from wnodes_core.errors import CommandError, HostError
from wnodes_htcondor import debs, labconf

FOLDERS = ("log", "spool", "execute", "lock", "run", "config.d")
START_S = 40.0


@dataclass
class Lab:
    """One pool of one host: collector, negotiator, schedd, startd; ``up()`` makes it, ``down()`` unmakes it.

    ``release`` is ``23`` (Debian 13's 23.9.6) or ``25`` (forky's). ``extra`` lines end condor_config.
    """

    folder: Path
    release: str = "23"
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory_mib: int = 6000
    kill_wait_s: int = 8
    port: int = 0  # the collector's; 0 = any free one
    extra: Sequence[str] = ()
    prefix: Path = Path()

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if self.prefix == Path():
            self.prefix = debs.prefix(self.release)

    @property
    def conf(self) -> Path:
        """The condor_config that a client names in CONDOR_CONFIG."""
        return self.folder / "condor_config"

    @property
    def config_d(self) -> Path:
        """Further configuration: read in the order of the names."""
        return self.folder / "config.d"

    @property
    def environ(self) -> dict[str, str]:
        """What a command of this lab's HTCondor needs to find it."""
        path = f"{self.prefix}/usr/bin:{self.prefix}/usr/sbin:{tools.PATH}"
        return {"CONDOR_CONFIG": str(self.conf), "PATH": path, "LC_ALL": "C.UTF-8"}

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Write the configuration and start. Raises HostError with the logs' last words."""
        self.write()
        self.start()

    def write(self) -> None:
        """Make the folder and its condor_config; nothing runs yet."""
        if self.master():
            raise HostError(f"{self.folder}: a lab runs here and was not taken down")
        for name in (".", *FOLDERS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        if os.getuid() == 0:
            _make_account()
            for name in FOLDERS[:-1]:  # the startd refuses an EXECUTE that is not its own (exit status 4)
                shutil.chown(self.folder / name, "condor", "condor")
        tools.write_atomic(self.conf, labconf.condor_config(self).encode())

    def start(self) -> None:
        """Start the daemons and wait for the slot. Raises HostError."""
        argv = ["condor_master", "-f", "-pidfile", str(self._pid_file)]
        child = tools.spawn(argv, environ=self.environ)
        _CHILDREN[str(self.folder)] = child
        deadline = time.monotonic() + START_S
        while not self._ready():
            if child.poll() is not None or time.monotonic() > deadline:
                logs = "".join(f"\n{name}: {self.log(name, 800)}" for name in ("MasterLog", "StartLog", "SchedLog"))
                raise HostError(f"HTCondor lab {self.folder} did not start{logs}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        slots = self.run(["condor_status", "-af", "Name"], check=False)
        return bool(slots.strip()) and self.run(["condor_q", "-all", "-total"], check=False).strip() != ""

    def down(self) -> None:
        """End all daemons and jobs of the lab; its folder stays. Idempotent."""
        master = self.master()
        family = [master, *self.family()] if master else []
        if master:
            os.kill(master.pid, signal.SIGQUIT)  # fast shutdown: the starters kill their jobs
            self._wait(lambda: not tools.alive(master), 15)
        for process in family:
            tools.kill(process)
        child = _CHILDREN.pop(str(self.folder), None)
        if child is not None:
            child.wait(timeout=5)
        self._pid_file.unlink(missing_ok=True)

    # -- words for tests -----------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, check: bool = True, timeout_s: float = 60.0) -> str:
        """What an HTCondor command prints, run as the caller. Raises CommandError."""
        return tools.run(argv, environ=self.environ, check=check, timeout_s=timeout_s).text

    def run_as(
        self, user: str, argv: Sequence[str], *, cwd: str = "/tmp", check: bool = True, timeout_s: float = 60.0
    ) -> tools.Result:
        """Run a command in this lab as an ordinary user. Raises CommandError."""
        environ = {**self.environ, "HOME": pwd.getpwnam(user).pw_dir, "USER": user, "LOGNAME": user}
        become = self.identity(user)
        return tools.run(argv, environ=environ, cwd=cwd, check=check, timeout_s=timeout_s, become=become)

    @staticmethod
    def identity(user: str) -> tuple[int, int, list[int]]:
        """uid, gid and groups of a user, as ``tools.run(become=…)`` takes them."""
        entry = pwd.getpwnam(user)
        return entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)

    def log(self, name: str, limit: int = 4000) -> str:
        """The tail of one daemon's log, as in ``StartLog`` or ``StarterLog.slot1_1``."""
        return tools.read_tail(self.folder / "log" / name, limit)

    def reconfig(self) -> None:
        """Have the daemons read their configuration again. Raises CommandError."""
        self.run(["condor_reconfig", "-all"])

    def master(self) -> Process | None:
        """The condor_master of this folder, if it lives."""
        with suppress(OSError, ValueError):
            process = tools.read(int(self._pid_file.read_text()))
            if process and os.path.basename(process.exe) == "condor_master":
                return process
        return None

    def family(self) -> list[Process]:
        """Every process below the master, parents before children."""
        master = self.master()
        table = list(tools.table())
        found = [master] if master else []
        for process in found:  # grows while it is walked
            found += [p for p in table if p.parent == process.pid]
        return found[1:]

    def daemons(self, name: str) -> list[Process]:
        """The processes of one kind: ``condor_startd``, ``condor_starter``, ``condor_schedd``."""
        return [p for p in self.family() if os.path.basename(p.exe) == name]

    @property
    def _pid_file(self) -> Path:
        return self.folder / "run" / "master.pid"

    @staticmethod
    def _wait(done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.05)


_CHILDREN: dict[str, Any] = {}


def _make_account() -> None:
    """HTCondor's own account, as Debian's package would make it. Raises HostError."""
    try:
        pwd.getpwnam("condor")
    except KeyError:
        argv = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        try:
            tools.run([*argv, "--shell", "/usr/sbin/nologin", "condor"])
        except CommandError as error:
            raise HostError(f"no account 'condor': {error.message}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m wnodes_htcondor.lab up|write|start|down DIR``."""
    parser = argparse.ArgumentParser(prog="python -m wnodes_htcondor.lab", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("up", "write", "start", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--release", choices=tuple(debs.SUITES), default="23", help="of HTCondor (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=int, dest="memory_mib", default=6000, metavar="MIB", help="(default: %(default)s)"
    )
    parser.add_argument("--kill-wait", type=int, dest="kill_wait_s", default=8, metavar="SECONDS")
    parser.add_argument("--extra", action="append", default=[], metavar="LINE", help="a line for condor_config")
    values = vars(parser.parse_args(argv))
    action = values.pop("action")
    try:
        lab = Lab(**{**values, "folder": values["folder"].absolute()})
        {"up": lab.up, "write": lab.write, "start": lab.start, "down": lab.down}[action]()
    except HostError as error:
        print(f"wnodes: {error}", file=sys.stderr)
        return 1
    if action in ("up", "start"):
        print(f"export CONDOR_CONFIG={lab.conf} PATH={lab.prefix}/usr/bin:{lab.prefix}/usr/sbin:$PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())
