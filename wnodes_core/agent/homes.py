"""The cgroups in which a lease's VM lives when it must outlive the step that starts it.

cgroup v1: the groups of a process that lives as long as the job, in every hierarchy but freezer.
A batch system ends and suspends steps through their freezer groups (Slurm's proctrack/cgroup,
10 ms after scancel); ours is a group of our own, so that the user's grace survives - and so that
whatever is left in it at the end can be found. cgroup v2: a group ``wnodes`` beside the home's.
Without such a process: a group ``wnodes`` in the job's own group, where one carries its id.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wnodes_core import processes
from wnodes_core.errors import HostBusy
from wnodes_core.journal import Journal
from wnodes_core.model import Process

NAME = "wnodes"
_EMPTY_S = 5.0


@dataclass(frozen=True)
class Target:
    """One group to move into; ``make`` says that it is ours: made before, removed after."""

    folder: str
    make: bool = False


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy and where in it a process is. v2 has no controllers here."""

    controllers: tuple[str, ...]
    mount: str
    path: str
    pure_v2: bool

    @property
    def freezer(self) -> bool:
        """Whether this is cgroup v1's freezer."""
        return "freezer" in self.controllers

    def folder(self, path: str) -> str:
        """The folder of a group of this hierarchy."""
        return self.mount + path.rstrip("/")


def hierarchies(pid: int, mounts: str | None = None, groups: str | None = None) -> list[Hierarchy]:
    """Where a process is in each hierarchy mounted here; texts may be given by tests."""
    mounts = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    groups = Path(f"/proc/{pid}/cgroup").read_text() if groups is None else groups
    where = _mounts(mounts)
    lines = [line.split(":", 2) for line in groups.splitlines()]
    pure_v2 = [number for number, _, _ in lines] == ["0"]
    found = []
    for _, names, path in lines:
        controllers = tuple(n for n in names.split(",") if n)
        mount = where.get(controllers)
        if mount:
            found.append(Hierarchy(controllers, mount, path, pure_v2))
    return found


def _mounts(text: str) -> dict[tuple[str, ...], str]:
    """Mount points by controllers, from mountinfo (proc(5)); v2 under ()."""
    known: dict[tuple[str, ...], str] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = before.split(" ")[4]
        if kind == "cgroup2":
            known.setdefault((), point)
        elif kind == "cgroup":
            flags = ("rw", "ro", "xattr", "clone_children", "noprefix")
            names = [n for n in options.split(",") if n not in flags and not n.startswith("release_agent=")]
            known.setdefault(tuple(names), point)
    return known


def targets(keeper: list[Hierarchy], home: list[Hierarchy], lease_id: str, job_id: str) -> list[Target]:
    """The groups a keeper belongs into, given where it and the job-long process are. Pure.

    Empty if the job has no group of its own: the VM then stays where its step is.
    """
    chosen = list(_beside(home)) if home else list(_below_job(keeper, job_id))
    if not home and not chosen:
        return []
    freezer = next((h for h in keeper if h.freezer), None)
    if freezer:
        parent = freezer.folder(f"/{NAME}")
        chosen += [Target(f"{parent}/{lease_id}", make=True)]
    return chosen


def _beside(home: list[Hierarchy]) -> Iterator[Target]:
    for each in home:
        if each.pure_v2:
            yield Target(each.folder(os.path.dirname(each.path)) + f"/{NAME}", make=True)
        elif not each.freezer:
            yield Target(each.folder(each.path))


def _below_job(keeper: list[Hierarchy], job_id: str) -> Iterator[Target]:
    job = re.compile(rf"(.*/job[._-]?{re.escape(job_id)}(?![0-9A-Za-z])[^/]*)(/|\Z)")
    for each in keeper:
        match = job.match(each.path)
        if match and not each.freezer:
            yield Target(each.folder(match[1]) + f"/{NAME}", make=True)


def settle(
    journal: Journal,
    keeper: Process,
    home: Process | None,
    lease_id: str,
    job_id: str,
    others: Sequence[Process] = (),
) -> list[str]:
    """Move the keeper and ``others`` of its VM into its lease's home; where that is, [] if there is none.

    Blocks. Raises HostBusy if the kernel refuses, with what was made in the journal.
    """
    there = hierarchies(home.pid) if home else []
    moves = targets(hierarchies(keeper.pid), there, lease_id, job_id)
    try:
        for move in moves:
            if move.make:
                with journal.making_it("cgroup", move.folder):
                    os.makedirs(move.folder, exist_ok=True)
                    _inherit_cpuset(move.folder)
            for process in (keeper, *others):
                _enter(move.folder, process)
    except OSError as error:
        raise HostBusy(f"cannot move process {keeper.pid} into the job's cgroup: {error}") from error
    return [move.folder for move in moves]


def join(process: Process, movers: Sequence[Process]) -> None:
    """Move ``movers`` into the groups in which ``process`` is, all of them.

    Blocks. Raises HostBusy if the kernel refuses.
    """
    try:
        for each in hierarchies(process.pid):
            if not processes.alive(process):
                raise ProcessLookupError(f"process {process.pid} has ended")
            for mover in movers:
                _enter(each.folder(each.path), mover)
    except OSError as error:
        raise HostBusy(f"cannot move a pooled VM into the groups of process {process.pid}: {error}") from error


def _enter(folder: str, process: Process) -> None:
    if not processes.alive(process):
        raise ProcessLookupError(f"process {process.pid} has ended")
    fd = os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.write(fd, str(process.pid).encode())
    finally:
        os.close(fd)


def _inherit_cpuset(folder: str) -> None:
    """A new v1 cpuset group takes no process before it has cpus and mems (cpuset(7))."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        mine = Path(folder, name)
        if mine.exists() and not mine.read_text().strip():
            mine.write_text((Path(folder).parent / name).read_text())


def remove(folder: str) -> None:
    """End what is left in a group of ours and remove it; absent is fine.

    Blocks up to 5 s. Raises OSError if it cannot be emptied.
    """
    if os.path.basename(folder) != NAME and os.path.basename(os.path.dirname(folder)) != NAME:
        raise OSError(f"{folder}: not a group of ours")
    deadline = time.monotonic() + _EMPTY_S
    while True:
        for pid in _members(folder):
            process = processes.read(pid)
            if process:
                processes.kill(process, wait_s=1.0)
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)  # the kernel tells nobody when a v1 group's last zombie is gone
            continue
        with suppress(OSError):  # the freezer's common parent, once its last lease is gone
            if os.path.basename(os.path.dirname(folder)) == NAME:
                os.rmdir(os.path.dirname(folder))
        return


def _members(folder: str) -> list[int]:
    try:
        return [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
    except OSError:
        return []
