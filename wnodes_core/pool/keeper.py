"""A keeper that waits for a job: born as root, the job's user for good from the claim on.

Started by wnodesd as ``python -I -m wnodes_core.pool.keeper`` with one end of a socket pair as its stdin. The first
message raises the slot's VM (in the warden's hands, see there); the second, if one comes, is a claim: who the user
is, what the lease is. As root this process reads nothing that a guest or a user has written but the warden's short
reports, touches the slot's folder through its descriptor only, and the lease's folder not at all.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wnodes_core import processes
from wnodes_core.errors import HostError, TransientError, WnodesError
from wnodes_core.keeper import Keeper, log
from wnodes_core.keeper_lease import Holding
from wnodes_core.keeper_process import log_into, settle_in
from wnodes_core.model import Process
from wnodes_core.plan import Plan
from wnodes_core.plugins import Plugins
from wnodes_core.pool import warden, wire
from wnodes_core.pool.become import become
from wnodes_core.pool.ending import end_all_of
from wnodes_core.pool.pooled import Pooled
from wnodes_core.pool.warden import Account
from wnodes_core.trace import Trace

RAISE_S = 60.0
OWN_FILES = ("console.log", "qemu.log")  # of QEMU's, that the lease's owner may read and cut


class Claimed(Keeper):
    """A keeper whose launcher is not its parent."""

    started = 0

    def is_launcher(self, pid: int) -> bool:
        """By its time of birth."""
        return processes.alive(Process(pid, 0, 0, self.started, "", ()))


@dataclass
class Slot:
    """What this process waits with."""

    plan: Plan
    account: Account
    hook: Any
    warden: socket.socket
    warden_pid: int = 0


def main() -> int:
    """Entry point: raise, wait, become the user's keeper."""
    # Neither a child of ours nor a later life of this process inherits the way to wnodesd.
    control = socket.socket(fileno=os.dup(0))
    _no_stdin()
    settle_in("/")
    slot: Slot | None = None
    try:
        slot = _begin(control)
        pooled = _raised(slot, control)
        gc.collect()
        gc.freeze()
        claim = _claim(slot, control)
        if claim is None:
            return 0
        return _serve(slot, pooled, claim)
    except WnodesError as error:
        if os.geteuid() == 0:
            with suppress(WnodesError):
                wire.send(control, {"error": error.to_dict()})
        return 1
    finally:
        if slot and os.geteuid() == 0:
            slot.warden.close()
            end_all_of(slot.account.uid)


def _no_stdin() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _begin(control: socket.socket) -> Slot:
    """Have a warden raise the VM. Raises TransientError."""
    given, fds = wire.receive(control)
    plan = Plan.from_dict(given["plan"]).with_memory(fds)
    account = Account(int(given["uid"]), int(given["gid"]), tuple(given["groups"]))
    hook = Plugins(disabled=tuple(given.get("disabled", ()))).hook
    os.setpriority(os.PRIO_PROCESS, 0, int(given.get("nice", 0)))
    ours, theirs = wire.pair()
    slot = Slot(plan, account, hook, ours)
    slot.warden_pid = os.fork()
    if slot.warden_pid == 0:
        ours.close()
        control.close()
        warden.main(theirs, plan, account, hook)
    theirs.close()
    wire.close(fds)
    return slot


def _raised(slot: Slot, control: socket.socket) -> Pooled:
    """The VM as the warden reports it; wnodesd is told. Raises WnodesError."""
    ready, _, _ = select.select([slot.warden, control], [], [], RAISE_S)
    if slot.warden not in ready:
        raise TransientError("pool: wnodesd has gone" if ready else f"pool: no clone within {RAISE_S:g} s")
    report, fds = wire.receive(slot.warden)
    told = report.get("ok")
    if not isinstance(told, dict) or len(fds) != 1:
        wire.close(fds)
        raise TransientError(f"pool: {str(report.get('error', report))[:1000]}")
    pid, started = told.get("pid"), told.get("started")
    process = processes.read(pid, command_of_users=False) if isinstance(pid, int) else None
    if process is None or process.uid != slot.account.uid or process.started != started:
        raise TransientError(f"pool: the warden names process {str(pid)[:20]}, which is not its own")
    facts = told.get("facts")
    pooled = Pooled(slot.warden, socket.socket(fileno=fds[0]), process, facts if isinstance(facts, dict) else {})
    os.setpriority(os.PRIO_USER, slot.account.uid, 0)  # what was niced to be raised runs a job soon
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    wire.send(control, {"idle": {"warden": slot.warden_pid, "vm": pid}})
    return pooled


def _claim(slot: Slot, control: socket.socket) -> dict[str, Any] | None:
    """Wait for a job; None if wnodesd, the warden or its VM goes first."""
    poll = select.poll()
    vm = slot.warden  # its end is the VM's
    for each in (control, vm):
        poll.register(each, select.POLLIN | select.POLLHUP)
    ready = dict(poll.poll())
    if vm.fileno() in ready:
        return None
    try:
        claim, fds = wire.receive(control)
    except TransientError:
        return None
    wire.close(fds)
    control.close()
    return claim


def _serve(slot: Slot, pooled: Pooled, claim: dict[str, Any]) -> int:
    """Become the job's user and keep the lease, as every keeper does."""
    plan = Plan.from_dict(claim["plan"])
    pooled.nice = int(claim.get("nice", 0))
    cpuset = [int(cpu) for cpu in claim.get("cpuset", ())]
    _hand_over(slot, plan)
    become(plan.user.uid, plan.user.gid, list(plan.user.groups.values()))
    os.chdir(plan.folder)
    log_into(f"{plan.folder}/keeper.log")
    try:
        if cpuset:
            with suppress(OSError):
                os.sched_setaffinity(0, cpuset)
        if pooled.nice > os.getpriority(os.PRIO_PROCESS, 0):
            os.setpriority(os.PRIO_PROCESS, 0, pooled.nice)
        for name in OWN_FILES:
            with suppress(OSError):  # whatever the user has put there stays
                os.link(f"{plan.slot}/{name}", f"{plan.folder}/{name}")
        holding = Holding(claim["daemon"], plan.lease, claim["token"])
        holding.claim()
        plan = plan.with_memory(holding.fds)
        asyncio.run(_keep(slot, plan, holding, pooled, claim))
    except Exception:  # noqa: BLE001 - the outermost net: nobody is above to hear it, the log is
        log.exception("keeper of %s failed", plan.lease)
        return 1
    return 0


async def _keep(slot: Slot, plan: Plan, holding: Holding, pooled: Pooled, claim: dict[str, Any]) -> None:
    launcher = claim.get("launcher") or {"pid": 0, "started": 0}
    trace = Trace.from_dict(claim.get("trace"))
    keeper = Claimed(plan, slot.hook, holding, int(launcher["pid"]), trace, pooled)
    keeper.started = int(launcher["started"])
    await keeper.run()


def _hand_over(slot: Slot, plan: Plan) -> None:
    """Give the user the slot's folder, and what in it is theirs to read: never anything that the slot did not own."""
    uid, gid, own = plan.user.uid, plan.user.gid, slot.account.uid
    folder = os.open(slot.plan.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder).st_uid != own or plan.slot != slot.plan.folder:
            raise HostError(f"{slot.plan.folder}: want a folder of uid {own}, found uid {os.fstat(folder).st_uid}")
        os.fchown(folder, uid, gid)
        for name in OWN_FILES:
            with suppress(OSError):
                _give(name, folder, own, uid, gid)
    finally:
        os.close(folder)


def _give(name: str, folder: int, own: int, uid: int, gid: int) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == own:
            os.fchown(fd, uid, gid)
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
