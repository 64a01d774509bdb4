"""One slot of the pool, as wnodesd has it: making it, ending it, what is on disk of it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from wnodes_core import command, processes
from wnodes_core.agent.ending import remove_folder
from wnodes_core.errors import CommandError, HostBusy, SettingsError, TransientError, WnodesError, from_dict
from wnodes_core.files import private_folder
from wnodes_core.model import Job, Mount, Process, Template
from wnodes_core.plan import Plan, User
from wnodes_core.pool import wire
from wnodes_core.pool.ending import end_all_of

RAISE_S = 75.0  # a little more than a waiting keeper gives its own clone
_NAME = re.compile(r"(\d+)-[0-9a-f]{4}\Z")
_KVM = "/dev/kvm"
_CAP_SYS_NICE = 23  # linux/capability.h
_NICE = 10


@dataclass
class Slot:
    """A clone that waits; ``control`` is its keeper's ear."""

    name: str
    uid: int
    folder: str
    template: Template
    control: socket.socket
    child: Any  # Popen: wnodesd reaps it
    keeper: Process


class Slots:
    """Slots below STATE_DIR/pool. Everything blocks: run it in a thread."""

    def __init__(self, state_dir: str, store: Any) -> None:
        self.root = f"{state_dir}/pool"
        self._store = store

    def make(self, entry: Any, plan_of: Plan, uid: int, memory: int, disabled: tuple[str, ...]) -> Slot:
        """Have a clone raised by a keeper that then waits. Raises WnodesError; then nothing of it is left."""
        check_account(uid)
        name = f"{uid}-{os.urandom(2).hex()}"
        folder = f"{self.root}/{name}"
        os.makedirs(self.root, mode=0o711, exist_ok=True)
        plan = _plan(plan_of, name, folder, uid)
        assert plan.template is not None
        try:
            private_folder(folder, uid=uid, gid=uid)
            self._store.take(entry, name, uid)
            _let_in(plan.template.folder, uid)
            return self._started(plan, uid, memory, disabled)
        except BaseException:
            self.undo(name, plan.template.folder)
            raise

    def _started(self, plan: Plan, uid: int, memory: int, disabled: tuple[str, ...]) -> Slot:
        ours, theirs = wire.pair()
        argv = [sys.executable, "-I", "-m", "wnodes_core.pool.keeper"]
        child = command.spawn(argv, stdin=theirs.fileno(), stderr=2)
        theirs.close()
        given = {"plan": plan.to_dict(), "uid": uid, "gid": uid, "groups": _groups(plan.accel), "disabled": disabled}
        try:
            ours.settimeout(RAISE_S)
            wire.send(ours, {**given, "nice": _NICE if may_renice() else 0}, [memory])
            told, fds = wire.receive(ours)
            wire.close(fds)
            if "idle" not in told:
                raise _error(told)
            keeper = processes.read(child.pid)
            if keeper is None:
                raise TransientError(f"slot {plan.lease}: its keeper has ended")
        except BaseException:
            ours.close()
            child.kill()
            child.wait()
            raise
        assert plan.template is not None
        return Slot(plan.lease, uid, plan.folder, plan.template, ours, child, keeper)

    def undo(self, name: str, template_folder: str = "") -> None:
        """End all of a slot and remove what it left; idempotent. Raises WnodesError, OSError."""
        match = _NAME.match(name)
        if not match:
            raise WnodesError(f"slot {name!r}: no slot of ours")
        uid = int(match[1])
        if not end_all_of(uid):
            raise HostBusy(f"slot {name}: processes of uid {uid} survive SIGKILL")
        self._store.release(name)
        if template_folder and os.path.isdir(template_folder):
            with suppress(CommandError):
                command.run(["setfacl", "-x", f"u:{uid}", "--", template_folder], timeout_s=10)
        remove_folder(f"{self.root}/{name}")

    def names(self) -> list[str]:
        """The slots that have a folder."""
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self.root) if _NAME.match(name)]
        return []


def uid_of(name: str) -> int:
    """The uid that a slot of this name has."""
    return int(name.partition("-")[0])


def check_account(uid: int) -> None:
    """A slot's uid, its gid too, is nobody's: what runs under it is ended without asking. Raises SettingsError."""
    with suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
        raise SettingsError(f"warm.pool_uids: {uid} is the account {name!r}: want uids that nobody has")
    with suppress(KeyError):
        name = grp.getgrgid(uid).gr_name
        raise SettingsError(f"warm.pool_uids: {uid} is the group {name!r}: want numbers that no group has either")


def may_renice() -> bool:
    """Whether we may raise a process's priority again; else the pool is filled at the common one."""
    with open("/proc/self/status", encoding="ascii") as file:
        held = next(line for line in file if line.startswith("CapEff"))
    return bool(int(held.split()[1], 16) >> _CAP_SYS_NICE & 1)


def _plan(plan: Plan, name: str, folder: str, uid: int) -> Plan:
    node = socket.gethostname().partition(".")[0]
    template = plan.template
    assert template is not None
    user = User(f"uid{uid}", uid, uid, "/")
    job = Job("pool", name, node, uid, uid, user.name)
    ports = (Mount("/", "/mnt"),) * template.mount_ports  # so that each port has a socket
    return replace(plan, lease=name, folder=folder, job=job, user=user, mounts=ports)


def _let_in(folder: str, uid: int) -> None:
    if not os.lstat(folder).st_mode & stat.S_IXOTH:
        command.run(["setfacl", "-m", f"u:{uid}:rx", "--", folder], timeout_s=10)


def _groups(accel: str) -> list[int]:
    if accel != "kvm":
        return []
    found = os.stat(_KVM)
    return [found.st_gid] if found.st_gid and found.st_mode & stat.S_IRGRP else []


def _error(told: dict[str, Any]) -> WnodesError:
    error = told.get("error")
    return from_dict(error) if isinstance(error, dict) else TransientError(f"pool: {str(told)[:500]}")
