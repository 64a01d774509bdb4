"""The keeper: the process that owns one lease's VM, from its start to its clean end.

Runs as the job's user in the job's cgroup, in a session of its own, and shrugs off the signals
that a batch system sends to a whole step: the user's program in the guest gets them from the
launcher, and has its grace. It ends when its lease ends (told by wnodesd, or, embedded, when the
last launcher has gone), or with its VM.

Started by the launcher as ``python -I -m wnodes_core.keeper`` with a JSON object on stdin:
``{"plan": {…}, "token": "…", "daemon": "/run/wnodes/wnodesd.sock"}``; no token = embedded.
``"launcher"`` is the pid of our parent, if the lease ends with it: embedded, or a job-long step.
``"trace"`` is the launcher's part of the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wnodes_core import following, history, plugins, processes
from wnodes_core.errors import ChannelLost, GuestPanic, StateDirFull, Verdict, WnodesError
from wnodes_core.files import remove_tree, write_atomic
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.guest.relay import Relay
from wnodes_core.journal import Journal
from wnodes_core.keeper_lease import Holding
from wnodes_core.keeper_process import log_into, settle_in
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.plan import Plan
from wnodes_core.plugins import BUILTINS, Plugins
from wnodes_core.pool.pooled import Pooled
from wnodes_core.trace import FIRST, Trace

log = logging.getLogger("wnodes.keeper")

CONSOLE_CHECK_S = 5.0
# The guest's console, QEMU's complaints of the guest's drivers, gateways' of its requests.
LOGS = ("console.log", "qemu.log", "libvirt/log/qemu/*.log", "keeper.log")
HEARD_S = 5.0


class Keeper:
    """One lease, from plan to clean end."""

    def __init__(
        self,
        plan: Plan,
        hook: Any,
        holding: Holding | None,
        launcher: int = 0,
        trace: Trace | None = None,
        pooled: Pooled | None = None,
    ) -> None:
        self.plan = plan
        self.hook = hook
        self.holding = holding
        self.launcher = launcher  # our parent, if its end is the lease's
        self.trace = trace or Trace()
        self.since = time.time()
        self.state = "starting"
        self.reason = ""
        self.failed = False
        self.accounts: Any = None  # ``keeper_become.Accounts``, where the site lets a job become another
        self._end = asyncio.Event()
        self.relay = Relay(f"{plan.folder}/keeper.sock")
        self.relay.on_last_closed = self._launchers_gone
        self.relay.on_pause = self._pause
        self.relay.on_phase = self._phase
        self.journal = Journal(f"{plan.folder}/journal")
        self.lifecycle = Lifecycle(plan, self.journal, hook, self.trace, self.relay.announce, pooled)

    async def run(self) -> None:
        """Serve the lease until it ends; nothing of the VM is left when this returns."""
        self._tell("starting")
        await self.relay.start()
        if self.holding:
            self.holding.start(on_end=self.end)
        aside = [asyncio.ensure_future(self._bound_logs())]
        if self.launcher:
            following.to_the_end(self.launcher, self.is_launcher, lambda: self.end("the launcher has gone"))
            aside.append(asyncio.ensure_future(following.stops(self.launcher, self._pause)))
        try:
            running = await self._start_unless_ended()
            if running:
                await self._serve(running)
        except WnodesError as error:
            await self._fail(error)
        except Exception as error:  # noqa: BLE001 - a bug of ours must reach the user, not only the log
            log.exception("bug")
            await self._fail(WnodesError(f"bug in the keeper: {type(error).__name__}: {error}"))
            raise
        finally:
            for task in aside:
                task.cancel()
            await self._tear_down()

    async def _start_unless_ended(self) -> Running | None:
        self.trace.catch_up("keeper")
        starting = asyncio.ensure_future(self.lifecycle.start())
        ending = asyncio.ensure_future(self._end.wait())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if starting.done():
            return starting.result()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None

    async def _serve(self, running: Running) -> None:
        if self.plan.run_as:
            from wnodes_core.keeper_become import Accounts  # 10 ms that few sites' jobs need

            self.accounts = Accounts(self.lifecycle.plan, running.channel, self.holding)
            self.relay.on_become = self.accounts.opened
        self.relay.ready(running.channel)
        self._tell("running")
        watched: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._end.wait()),
            asyncio.ensure_future(self.lifecycle.watch.ended()),
            running.channel.lost,
        ]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for task in watched[:2]:
            task.cancel()
        if self._end.is_set():
            return
        await self._vm_was_lost(running.channel)

    async def _vm_was_lost(self, channel: GuestChannel) -> None:
        """The guest ended by itself or broke its channel while commands ran in it."""
        with contextlib.suppress(TimeoutError):
            # A closed channel is what a dying QEMU shows first: give its end a moment to be seen.
            await asyncio.wait_for(self.lifecycle.watch.ended(), 2)
            raise GuestPanic(f"the VM ended while the job ran in it{self.lifecycle.watch.last_words()}")
        why = channel.lost.result().message if channel.lost.done() else "the VM has gone"
        raise ChannelLost(f"{why}, while the job ran{self.lifecycle.watch.last_words()}")

    def end(self, reason: str) -> None:
        """End the lease now; the first reason counts."""
        self.reason = self.reason or reason
        self._end.set()

    def is_launcher(self, pid: int) -> bool:
        """Whether this pid is still our launcher's."""
        return os.getppid() == pid

    def _launchers_gone(self) -> None:
        if self.holding is None:
            self.end("the last launcher has gone")

    async def _fail(self, error: WnodesError) -> None:
        self.failed = True
        self._tell("failed", error)
        if self.holding and error.verdict is Verdict.REQUEUE:
            error = await self.holding.verdict(error)  # whether the job is to run anew, its launcher must know
        self.relay.fail(error)

    def _phase(self, name: str, seconds: float) -> str:
        """A phase that only the relay sees: the first command's first instruction, its run."""
        self.trace.add(name, seconds)
        asyncio.get_running_loop().call_soon(lambda: self._tell(self.state))  # after the frame: a disk may be slow
        return self.trace.line() if name == FIRST and self.plan.trace else ""

    async def _pause(self, paused: bool) -> None:
        await asyncio.to_thread(self.lifecycle.pause, paused)

    async def _bound_logs(self) -> None:
        """Keep what a guest can make longer below its limit, from its first byte: the node's disk is finite."""
        limit = self.plan.console_kib << 10
        while True:
            await asyncio.sleep(CONSOLE_CHECK_S)
            for path in (path for name in LOGS for path in Path(self.plan.folder).glob(name)):
                with contextlib.suppress(OSError):
                    if path.stat().st_size > limit:
                        os.truncate(path, 0)  # whoever writes it appends

    async def _tear_down(self) -> None:
        self._tell("ending")
        if self.accounts:
            await self.accounts.stop()
        if self.failed:
            await self._be_heard()
        await self.relay.stop()
        errors = await asyncio.to_thread(self.lifecycle.stop)
        for error in errors:
            log.error("teardown: %s", error)
        if self.holding:
            await self.holding.finish(self._facts("gone"))
        elif not errors:
            self.journal.close()
            history.remember(Path(self.plan.folder).parent / history.OF_USER, self._lease(self._facts("ended")))
            remove_tree(self.plan.folder)

    async def _be_heard(self) -> None:
        """Wait a moment for the launcher that started us, so that it learns why there is no VM."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.relay.met, self._end)]
        await asyncio.wait(waits, timeout=HEARD_S, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()

    def _facts(self, state: str, error: WnodesError | None = None) -> dict[str, Any]:
        facts: dict[str, Any] = {"event": "state", "state": state, "reason": self.reason}
        facts |= {"origin": self.trace.origin, "trace": self.trace.steps, "start": asdict(self.trace.start)}
        facts["ran"] = self.relay.channel is not None  # the job's own code may have begun
        if error is not None:
            facts["error"] = error.to_dict()
        if self.lifecycle.watch.process:
            facts["vm_pid"] = self.lifecycle.watch.process.pid
        return facts

    def _tell(self, state: str, error: WnodesError | None = None) -> None:
        """Tell wnodesd and leave the state beside the VM for ``wnodes lease``."""
        self.state = state
        facts = self._facts(state, error)
        if self.holding:
            self.holding.tell(facts)
        try:
            write_atomic(f"{self.plan.folder}/lease.json", json.dumps(self._lease(facts)).encode(), mode=0o600)
        except (StateDirFull, OSError) as full:
            # It is for people to read; a full disk must not keep us from taking the VM down.
            log.warning("lease.json: %s", full)

    def _lease(self, facts: dict[str, Any]) -> dict[str, Any]:
        me = processes.read(os.getpid())
        return {
            "id": self.plan.lease,
            "lrms": self.plan.job.lrms,
            "job_id": self.plan.job.job_id,
            "node": self.plan.job.node,
            "user": self.plan.user.name,
            "uid": self.plan.user.uid,
            "image": f"{self.plan.image.name}:{self.plan.image.tag}",
            "folder": self.plan.folder,
            "keeper": {"pid": os.getpid(), "started": me.started if me else 0},
            "since": self.since,
            **facts,
        }


def main() -> int:
    """Entry point of the keeper process."""
    for name in BUILTINS:  # while the launcher still asks what there is to keep
        with contextlib.suppress(Exception):  # a broken one is reported when it is registered
            importlib.import_module(name)
    orders = sys.stdin.read()
    if not orders:
        return 0  # the launcher ended without any
    given = json.loads(orders)
    plan = Plan.from_dict(given["plan"])
    settle_in(plan.folder)
    plugins.keep_trace_stream()
    log_into(f"{plan.folder}/keeper.log")
    holding = Holding(given["daemon"], plan.lease, given["token"]) if given.get("token") else None
    try:
        if holding:
            holding.claim()
            plan = plan.with_memory(holding.fds)
        asyncio.run(_run(plan, holding, given))
    except Exception:  # noqa: BLE001 - the outermost net: nobody is above to hear it, the log is
        log.exception("keeper of %s failed", plan.lease)
        return 1
    return 0


async def _run(plan: Plan, holding: Holding | None, given: dict[str, Any]) -> None:
    hook = Plugins(disabled=tuple(given.get("disabled", ()))).hook
    await Keeper(plan, hook, holding, int(given.get("launcher", 0)), Trace.from_dict(given.get("trace"))).run()


if __name__ == "__main__":
    sys.exit(main())
