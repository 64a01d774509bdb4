"""An LSF of one's own in a folder: ``with Lab(folder) as lab``. Needs root; nothing of it is left at the end."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core import tools
from wnodes_lsf.simulator.jobs import _PRELUDE, package_root

COMMANDS = ("bjobs", "bkill", "bstop", "bresume", "brequeue", "bmod", "bswitch")
QUEUES = """\
Begin Queue
QUEUE_NAME = normal
End Queue
"""
_WRAPPER = """\
#!/bin/sh
LSF_ENVDIR={envdir} LSB_SIM_COMMAND={name} exec {python} -I -c "{prelude}" "$@"
"""


class Lab:
    """mbatchd and sbatchd of one cluster; ``options`` are further lines of lsf.conf."""

    def __init__(self, folder: Path, *, release: str = "T", queues: str = QUEUES, **options: object) -> None:
        self.folder = folder
        self.envdir, self.serverdir, self.bindir = (folder / name for name in ("conf", "etc", "bin"))
        self.share = folder / "work"
        self.queues = queues
        self.options = {"LSB_SIM_RELEASE": release, "LSB_SUB_COMMANDNAME": "y", **options}
        self.daemons: dict[str, int] = {}

    @property
    def environ(self) -> dict[str, str]:
        """What a user of this cluster has in the environment."""
        return {**tools.clean_environment(), "PATH": f"{self.bindir}:{tools.PATH}", "LSF_ENVDIR": str(self.envdir)}

    def write(self) -> None:
        """Configuration and programs; sites (and wnodes) may add to them before ``start``."""
        for path in (self.envdir, self.serverdir, self.bindir, self.share):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o755)
        where = {"LSF_SERVERDIR": self.serverdir, "LSF_BINDIR": self.bindir, "LSB_SHAREDIR": self.share}
        lines = [f"{name}={value}" for name, value in {**where, **self.options}.items()]
        (self.envdir / "lsf.conf").write_text("\n".join(lines) + "\n")
        (self.envdir / "lsb.queues").write_text(self.queues)
        for name in ("mbatchd", "sbatchd", "res"):
            # A program of that name, as the process table shows it: our interpreter under its name.
            shutil.copy(os.path.realpath(sys.executable), self.serverdir / name)
        for name in ("bsub", *COMMANDS):
            module = "bsub" if name == "bsub" else "commands"
            code = f"from wnodes_lsf.simulator.{module} import main; sys.exit(main())"
            prelude = _PRELUDE.format(root=package_root(), code=code)
            text = _WRAPPER.format(envdir=self.envdir, name=name, python=self.serverdir / "res", prelude=prelude)
            (self.bindir / name).write_text(text)
            (self.bindir / name).chmod(0o755)

    def start(self) -> None:
        """Start both daemons."""
        self.start_daemon("mbatchd")
        deadline = time.monotonic() + 10
        while not (self.share / "mbatchd.sock").exists():
            assert time.monotonic() < deadline, f"no mbatchd: {self.log('mbatchd')}"
            time.sleep(0.02)
        self.start_daemon("sbatchd")

    def start_daemon(self, name: str) -> None:
        """Start (again) ``mbatchd`` or ``sbatchd``."""
        code = f"from wnodes_lsf.simulator.{name} import main; main()"
        argv = [str(self.serverdir / name), "-I", "-c", _PRELUDE.format(root=package_root(), code=code)]
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((null, 0), (log, 1), (log, 2))]
        self.daemons[name] = os.posix_spawn(argv[0], argv, self.environ, file_actions=actions, setsid=True)
        os.close(log)
        os.close(null)

    def kill_daemon(self, name: str, number: int = signal.SIGKILL) -> None:
        """End one daemon as ``kill`` does; its jobs stay."""
        pid = self.daemons.pop(name, 0)
        if pid:
            os.kill(pid, number)
            os.waitpid(pid, 0)

    def log(self, name: str) -> str:
        """What a daemon wrote."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def down(self) -> None:
        """End daemons, elims and every job."""
        for name in ("sbatchd", "mbatchd"):
            self.kill_daemon(name)
        state = self.share / "sbatchd.state"
        for entry in json.loads(state.read_text()).values() if state.exists() else ():
            with suppress(ProcessLookupError):
                os.killpg(entry["pid"], signal.SIGKILL)
        mark = str(self.folder)
        for process in tools.table():
            ours = any(mark in word for word in process.command[:2]) or process.exe.startswith(mark)
            if ours and process.pid != os.getpid():
                tools.kill(process)

    def run(self, argv: list[str], *, check: bool = True, **how: Any) -> tools.Result:
        """Run a command of this cluster as root (who may look, and not submit)."""
        return tools.run(argv, environ=self.environ, check=check, **how)

    def run_as(self, user: str, argv: list[str], *, environ: dict[str, str] | None = None, **how: Any) -> tools.Result:
        """Run a command of this cluster as an ordinary user. Raises CommandError."""
        entry = pwd.getpwnam(user)
        become = entry.pw_uid, entry.pw_gid, os.getgrouplist(user, entry.pw_gid)
        own = {**self.environ, "HOME": entry.pw_dir, "USER": user, "LOGNAME": user, **(environ or {})}
        return tools.run(argv, environ=own, become=become, **how)

    def __enter__(self) -> Lab:
        self.write()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
