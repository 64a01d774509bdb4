"""Undoing a lease, root's part: idempotent, resource by resource, never stopping half-way.

The order is fixed: processes first, then what they used, the marker late, the record last. The
user's own journal is replayed with the user's rights, in a process of its own.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from wnodes_core import command, processes
from wnodes_core.agent import homes, leases
from wnodes_core.agent.leases import Lease
from wnodes_core.errors import CommandError, WnodesError
from wnodes_core.files import remove_tree
from wnodes_core.journal import Resource
from wnodes_core.model import Process

ORDER = (
    "keeper", "slot", "account", "export", "port", "volume", "cgroup", "template", "use", "folder", "marker", "lease",
)  # fmt: skip
USER_UNDO_S = 60.0
# A user can make the replay of their own journal fail for ever (it is their file). After so many
# tries, with every process of the lease ended, the folder goes all the same.
PATIENCE = 5


class Maker(Protocol):
    """What root makes for a lease, and takes back."""

    def detach(self, resource: Resource) -> None:
        """Undo what its journal has; idempotent. Raises WnodesError if something of it is left."""


class Undoer:
    """Undoes leases; ``store`` is the node's, and ``makers`` are by the kind of what they made. All of it blocks."""

    def __init__(
        self,
        store: Any,
        user_undo: Callable[[Lease], None] | None = None,
        makers: Mapping[str, Maker] | None = None,
    ) -> None:
        self._store = store
        self._makers = makers or {}
        self._user_undo = user_undo or replay_as_user
        self.let_out: Callable[[Lease, Resource], object] = lambda lease, resource: None
        self.end_slot: Callable[[Resource], object] = lambda resource: None

    def undo(self, lease: Lease, *, job_over: bool) -> list[Exception]:
        """Undo all that is open; without ``job_over`` marker and record stay, so that no task runs bare."""
        errors: list[Exception] = []
        kept = () if job_over else ("marker", "lease")
        todo = sorted((r for r in lease.journal.open_resources if r.kind not in kept), key=_rank)
        for resource in todo:
            if resource.kind == "lease" and errors:
                break  # the record is what a retry starts from
            try:
                self._undo_one(lease, resource, bool(errors))
                lease.journal.gone(resource)
            except Exception as error:  # noqa: BLE001 - teardown never stops half-way (wall 4)
                error.add_note(f"while undoing {resource.kind} {resource.name}")
                errors.append(error)
        if job_over and not errors:
            lease.journal.close()
            os.unlink(lease.journal.path)
        return errors

    def _undo_one(self, lease: Lease, resource: Resource, failed: bool) -> None:
        match resource.kind:
            case "keeper":
                self._end_processes(lease)
            case kind if kind in self._makers:
                self._makers[kind].detach(resource)
            case "slot":
                self.end_slot(resource)
            case "cgroup":
                homes.remove(resource.name)
            case "template":
                self.let_out(lease, resource)
            case "use":
                self._store.release(lease.id)
            case "folder":
                if failed and lease.tries < PATIENCE:
                    raise WnodesError(f"{resource.name}: kept, the journal in it is needed for the next try")
                remove_folder(resource.name)
            case "marker":
                leases.remove_marker(lease)

    def _end_processes(self, lease: Lease) -> None:
        same_boot = lease.boot_id == leases.boot_id()
        failure: Exception | None = None
        try:
            self._user_undo(lease)
        except WnodesError as error:
            failure = error
        if same_boot:
            kill_left(lease)
        if failure:
            raise failure


def remove_folder(folder: str) -> None:
    """Remove a lease's folder; absent is fine.

    What is in it is a user's: folders a thousand deep, file systems of their own that answer when
    they like to. So its owner empties it, within a deadline; root only takes what is left then.

    Raises OSError, CommandError if something resists.
    """
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    become = (found.st_uid, found.st_gid, ()) if os.geteuid() == 0 else None
    for point in _mounts_below(folder):
        with suppress(CommandError):
            command.run(["fusermount3", "-uz", point], timeout_s=5, become=become)
    command.run(["rm", "-rf", "--", folder], timeout_s=USER_UNDO_S, become=become, check=False)
    remove_tree(folder)


def _mounts_below(folder: str) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split(" ")[4] for line in file]
    found = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points)
    return sorted((point for point in found if point.startswith(folder + "/")), reverse=True)


def _rank(resource: Resource) -> int:
    return ORDER.index(resource.kind) if resource.kind in ORDER else 0


def replay_as_user(lease: Lease) -> None:
    """Replay the keeper's journal with the rights of the job's user.

    Raises CommandError if something resists; WnodesError for a job of root's (whose journal we do
    not replay: our unprivileged rule would not hold).
    """
    if not os.path.lexists(f"{lease.folder}/journal"):
        return
    argv = [sys.executable, "-I", "-m", "wnodes_core.agent.undo", lease.folder]
    become = (lease.job.uid, lease.job.gid, _groups(lease.job.uid, lease.job.gid))
    command.run(argv, timeout_s=USER_UNDO_S, become=become)


def _groups(uid: int, gid: int) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


def kill_left(lease: Lease) -> None:
    """End the keeper if it still runs, and processes of this uid that carry the VM's name in their argv.

    Raises WnodesError for a process that survives SIGKILL.
    """
    name = f"wnodes-{lease.id}"
    left: list[Process] = [lease.keeper] if lease.keeper else []
    left += [p for p in processes.table() if p.uid == lease.job.uid and any(name in word for word in p.command)]
    for process in left:
        if not processes.kill(process):
            raise WnodesError(f"process {process.pid} survives SIGKILL")
