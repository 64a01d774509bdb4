"""The warden: owns one slot's hypervisor, under the slot's own account, until its keeper goes.

A QEMU cannot be given another user while it runs, so it has one of its own from its start. Nor does it
die with a keeper of another user: the kernel asks whether the dying parent may signal it (measured). So its
parent is this process, of its own user, whose only tie is a socket: when the keeper's end closes, both go.

It also is the only one that speaks to the guest before a job comes. Root never reads a guest's word.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from wnodes_core import processes
from wnodes_core.errors import NoProvider, TransientError, WnodesError
from wnodes_core.guest import handover
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.model import Disk, Process
from wnodes_core.plan import Plan
from wnodes_core.pool import wire
from wnodes_core.pool.become import become
from wnodes_core.trace import Trace

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_REHEARSED = (["sh", "-c", "true"], ["sshfs", "--version"], ["sshfs", "--version"])  # a failure of them is none


@dataclass(frozen=True)
class Account:
    """Whose the slot is: a uid and gid that nobody else has; ``groups`` for the access to KVM."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def main(sock: socket.socket, plan: Plan, account: Account, hook: Any) -> NoReturn:
    """Raise the VM, report, serve the keeper at ``sock``; never returns. Called in a process forked for it."""
    code = 1
    try:
        become(account.uid, account.gid, account.groups)
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # heeded as long as the keeper is root
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.umask(0o077)
        os.chdir(plan.folder)
        Warden(sock, plan, hook).run()
        code = 0
    except WnodesError as error:
        with suppress(WnodesError):
            wire.send(sock, {"error": error.to_dict()})
    finally:
        os._exit(code)


class Warden:
    """One slot's VM, from its clone to its end."""

    def __init__(self, sock: socket.socket, plan: Plan, hook: Any) -> None:
        self._sock = sock
        self._plan = plan
        self._hook = hook
        self._vm = plan.vm(())

    def run(self) -> None:
        """Until the keeper goes or the VM ends. Raises WnodesError if there is no VM to begin with."""
        try:
            report, port = asyncio.run(self._raise())
            wire.send(self._sock, {"ok": report}, [port.fileno()])
            port.close()
            self._serve(Process(report["pid"], 0, 0, report["started"], "", ()))
        finally:
            self._hook.wnodes_vm_stop(vm=self._vm)

    async def _raise(self) -> tuple[dict[str, Any], socket.socket]:
        """A clone with an identity of its own, checked, at a standstill; and its agent's port."""
        template = self._plan.template
        assert template is not None
        journal = Journal(f"{self._plan.folder}/journal")
        lifecycle = Lifecycle(self._plan, journal, self._hook, Trace(), lambda text: None)
        running: Running = await lifecycle.clone(template)
        await _warm_up(running)
        if not self._pause(True):
            raise NoProvider("no backend can pause this clone")
        port = handover.release(running.channel)
        # The folder is ours alone now and the job's user's alone later: who may walk it may use what is in it.
        for channel in self._vm.channels[1:]:
            if os.path.exists(channel.path):
                os.chmod(channel.path, 0o666)
        process = running.process
        return {"pid": process.pid, "started": process.started, "facts": running.channel.facts}, port

    def _pause(self, paused: bool) -> bool:
        return bool(self._hook.wnodes_vm_pause(vm=self._vm, paused=paused))

    def _serve(self, vm: Process) -> None:
        ended = processes.open_pidfd(vm)
        while ended is not None:
            ready, _, _ = select.select([self._sock.fileno(), ended], [], [])
            if ended in ready:  # whoever killed it: a slot without a VM is none
                return
            try:
                order, fds = wire.receive(self._sock)
            except TransientError:
                return
            try:
                answer = self._obey(str(order.get("do")), order, fds)
            except (WnodesError, OSError, KeyError, TypeError, ValueError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
            wire.close(fds)
            wire.send(self._sock, answer)
            if order.get("do") == "end":
                return

    def _obey(self, order: str, given: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
        match order:
            case "resume":
                self._fit(int(given["memory_mib"]), [int(cpu) for cpu in given["cpuset"]], int(given["nice"]))
                done = self._pause(False)
            case "pause":
                done = self._pause(bool(given["paused"]))
            case "plug" if len(fds) == 1:
                done = bool(self._hook.wnodes_disk_plug(vm=self._vm, disk=Disk(**given["disk"]), fd=fds[0]))
            case "end":
                done = bool(self._hook.wnodes_vm_stop(vm=self._vm))
            case _:
                raise ValueError(f"order {order!r}: want resume, pause, plug or end")
        return {"ok": done} if done else {"error": "the VM has gone"}

    def _fit(self, memory_mib: int, cpuset: Sequence[int], nice: int) -> None:
        """What the clone would have had, had its job started it: memory, CPUs, niceness."""
        vm = replace(self._vm, memory_mib=memory_mib, cpuset=tuple(cpuset))
        for thread in _threads([os.getpid(), int(self._pid())]):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cpuset)
                if nice > os.getpriority(os.PRIO_PROCESS, thread):
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
        if not self._hook.wnodes_vm_fit(vm=vm, template=self._plan.template):
            raise NoProvider("no backend can fit this clone")

    def _pid(self) -> int:
        found = [each for each in self._hook.wnodes_vm_list() if each["name"] == self._vm.name]
        if not found:
            raise TransientError("the VM has ended")
        return int(found[0]["pid"])


async def _warm_up(running: Running) -> None:
    """Let the guest do once what every start does: its pages are there then, and under TCG its code is translated."""
    channel = running.channel
    await channel.request("setup", clock=time.time())
    for argv in _REHEARSED:
        await channel.run(argv)


def _threads(pids: Sequence[int]) -> list[int]:
    return [int(name) for pid in pids for name in os.listdir(f"/proc/{pid}/task")]
