"""A real Slurm on loopback in a folder of its own, for demo and tests: up in seconds, down without a trace.

``with Lab(folder) as lab: lab.run_as("alice", ["sbatch", "job.sh"])``, or from a shell
``python -m wnodes_slurm.lab up|write|start|down DIR``.
Nothing outside the folder is written (Slurm itself makes its cgroups), so a site's own Slurm is not touched.
Contract read: slurm.conf(5), munged(8) of Slurm 22.05.8 and munge 0.5.15 as Debian 12 ships them.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
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
from wnodes_slurm import labconf

CGROUP_ROOT = Path("/sys/fs/cgroup")
@dataclass
class Lab:
    """One Slurm cluster of ``nodes`` slurmd on this host; ``up()`` makes it, ``down()`` unmakes it.

    ``prefix`` names the nodes (prefix0, prefix1, …): give concurrent labs different ones, because
    Slurm's cgroups bear the node's name. ``cgroup`` chooses cgroup v1 tracking and limits, else
    linuxproc. ``extra`` lines end slurm.conf's general part (``Prolog=…``).
    """

    folder: Path
    nodes: int = 1
    prefix: str = "n"
    cgroup: bool = False
    gather: str = "linux"  # sstat needs one that gathers; "cgroup" for jobacct_gather/cgroup
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory_mib: int = 0  # of each node; 0 = the host's, shared out
    mem_per_cpu_mib: int = 512
    features: str = ""
    kill_wait_s: int = 5
    extra: Sequence[str] = ()
    plugstack: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    @property
    def conf(self) -> Path:
        """The slurm.conf that a client names in SLURM_CONF."""
        return self.folder / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """Environment for Slurm's commands and daemons of this lab."""
        return {**tools.clean_environment(), "SLURM_CONF": str(self.conf)}

    @property
    def node_names(self) -> list[str]:
        """Slurm's names of the nodes."""
        return [f"{self.prefix}{i}" for i in range(self.nodes)]

    def __enter__(self) -> Lab:
        try:
            return self.up()
        except BaseException:
            self.down()
            raise

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, *, timeout_s: float = 60.0) -> Lab:
        """``write()`` and ``start()``."""
        return self.write().start(timeout_s=timeout_s)

    def write(self) -> Lab:
        """Make the folder and the configuration, which may then be edited before ``start()``."""
        if os.geteuid() != 0:
            raise HostError("a Slurm lab needs root: slurmd starts other users' jobs")
        self._prepare_folder()
        return self

    def start(self, *, timeout_s: float = 60.0) -> Lab:
        """Start munged, slurmctld and every slurmd; return when all nodes are idle.

        Raises HostError with the tail of the log of what did not start.
        """
        deadline = time.monotonic() + timeout_s
        munge_socket = self.folder / "munge" / "munge.socket"
        self._start("munged", labconf.munged_argv(munge_socket))
        self._until(munge_socket.exists, "munged", deadline)
        self._start("slurmctld", ["slurmctld", "-D"])
        # A slurmd that cannot register retries only after a second: let slurmctld listen first.
        self._until(lambda: self._listens(self._ports()["ctld"]), "slurmctld", deadline)
        nodes = self._known_nodes()
        for node in nodes:
            self._start(f"slurmd.{node}", ["slurmd", "-D", "-N", node])
        self._until(lambda: self._idle(nodes), f"slurmd.{nodes[0]}", deadline)
        return self

    def down(self) -> None:
        """Cancel what runs, stop every daemon by its pid, remove processes, cgroups and state. Idempotent."""
        started = self._started()
        if "slurmctld" in started and tools.alive(started["slurmctld"]):
            self._cancel_all()
        for name, process in reversed(started.items()):
            self._stop(name, process)
        for process in self.step_daemons():
            tools.kill(process)
        for node in self._known_nodes():
            self._remove_cgroups(node)
        for name in ("ctld", "run", "munge", *(f"spool.{node}" for node in self._known_nodes())):
            tools.remove_tree(self.folder / name)

    def run(self, argv: Sequence[str], *, check: bool = True, timeout_s: float = 60.0) -> str:
        """What a Slurm command prints, run as root in this lab. Raises CommandError."""
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
        """The tail of one daemon's log: ``munged``, ``slurmctld`` or ``slurmd.NODE``."""
        return tools.read_tail(self.folder / ("munge" if name == "munged" else "log") / f"{name}.log", limit)

    def step_daemons(self) -> list[Process]:
        """The slurmstepd processes of this lab (SLURM_CONF is all that its title leaves of its environment)."""
        return [p for p in tools.table() if Path(p.exe).name.startswith("slurmstepd") and self._is_ours(p.pid)]

    def kill_node(self, node: str, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one node's slurmd (a crash test)."""
        os.kill(self._started()[f"slurmd.{node}"].pid, sig)

    def start_node(self, node: str) -> None:
        """Start one node's slurmd again after ``kill_node``."""
        self._start(f"slurmd.{node}", ["slurmd", "-D", "-N", node])

    # -- making --------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if self._started():
            raise HostError(f"{self.folder}: a lab was started here and not taken down")
        for name in (".", "log", "run", "ctld", "munge", *(f"spool.{node}" for node in self.node_names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        for name, user in (("ctld", "slurm"), ("log", "slurm"), ("munge", "munge")):
            shutil.chown(self.folder / name, user, user)
        key = self.folder / "munge" / "munge.key"
        tools.write_atomic(key, os.urandom(128), mode=0o400)
        shutil.chown(key, "munge", "munge")
        ports = dict(zip(("ctld", *self.node_names), labconf.free_ports(self.nodes + 1), strict=True))
        tools.write_atomic(self.folder / "run" / "ports", json.dumps(ports).encode())
        tools.write_atomic(self.conf, labconf.slurm_conf(self, ports).encode())
        if self.cgroup:
            tools.write_atomic(self.folder / "cgroup.conf", labconf.CGROUP_CONF.encode())
        plugstack = self.folder / "plugstack.conf"
        if self.plugstack or not plugstack.exists():
            tools.write_atomic(plugstack, "".join(f"{line}\n" for line in self.plugstack).encode())

    def _start(self, name: str, argv: list[str]) -> None:
        started = self._started()
        child = tools.spawn(argv, environ=self.environ)
        _CHILDREN[child.pid] = child
        process = tools.read(child.pid)
        if process is None:
            raise HostError(f"{name}: ended at once: {self.log(name, 600)}")
        entry = {**{n: [p.pid, p.started] for n, p in started.items()}, name: [process.pid, process.started]}
        tools.write_atomic(self.folder / "run" / "started", json.dumps(entry).encode())

    def _started(self) -> dict[str, Process]:
        try:
            text = (self.folder / "run" / "started").read_text()
        except FileNotFoundError:
            return {}
        return {name: Process(pid, 0, 0, born, "", ()) for name, (pid, born) in json.loads(text).items()}

    def _ports(self) -> dict[str, int]:
        return dict(json.loads((self.folder / "run" / "ports").read_text()))

    def _known_nodes(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [name for name in self._ports() if name != "ctld"]
        return self.node_names

    # -- waiting and ending --------------------------------------------------------------------

    def _until(self, ready: Callable[[], bool], name: str, deadline: float) -> None:
        while not ready():
            dead = [n for n, p in self._started().items() if not tools.alive(p)]
            if dead or time.monotonic() > deadline:
                name = dead[0] if dead else name
                raise HostError(f"Slurm lab {self.folder}: {name} did not start: {self.log(name, 1200)}")
            time.sleep(0.02)

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def _idle(self, nodes: Sequence[str]) -> bool:
        text = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False)
        idle = {line.split()[0] for line in text.splitlines() if line.endswith(" idle")}
        return idle >= set(nodes)

    def _cancel_all(self) -> None:
        with suppress(CommandError):
            deadline = time.monotonic() + self.kill_wait_s + 10
            while jobs := self.run(["squeue", "-h", "-o", "%A"], timeout_s=5).split():
                self.run(["scancel", "--", *set(jobs)], check=False, timeout_s=5)
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)

    @staticmethod
    def _stop(name: str, process: Process) -> None:
        if tools.alive(process):
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while tools.alive(process) and time.monotonic() < deadline:
                time.sleep(0.02)
            tools.kill(process)
        if child := _CHILDREN.pop(process.pid, None):
            child.wait(timeout=5)

    def _is_ours(self, pid: int) -> bool:
        wanted = f"SLURM_CONF={self.conf}".encode()
        try:
            return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    @staticmethod
    def _remove_cgroups(node: str) -> None:
        for top in CGROUP_ROOT.glob(f"*/slurm_{node}"):
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)


_CHILDREN: dict[int, Any] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m wnodes_slurm.lab up|write|start|down DIR``."""
    parser = argparse.ArgumentParser(prog="python -m wnodes_slurm.lab", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "write", "start", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--prefix", default="n", help="names the nodes (default: %(default)s)")
    parser.add_argument("--cgroup", action="store_true", help="cgroup v1 tracking and limits instead of linuxproc")
    parser.add_argument("--gather", default="linux", help="jobacct_gather plug-in (default: %(default)s)")
    parser.add_argument("--features", default="", help="features of every node, as in vm,vm_debian12")
    parser.add_argument("--kill-wait", type=int, default=5, dest="kill_wait_s", metavar="SECONDS")
    parser.add_argument("--extra", action="append", default=[], metavar="LINE", help="a line for slurm.conf")
    parser.add_argument("--plugstack", action="append", default=[], metavar="LINE", help="a line for plugstack.conf")
    values = vars(parser.parse_args(argv))
    action = values.pop("action")
    lab = Lab(**{**values, "folder": values["folder"].absolute()})
    try:
        {"up": lab.up, "write": lab.write, "start": lab.start, "down": lab.down}[action]()
        print(f"export SLURM_CONF={lab.conf}" if action in ("up", "start") else lab.folder)
    except HostError as error:
        print(f"wnodes: {error}", file=sys.stderr)
        if action in ("up", "start"):
            lab.down()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
