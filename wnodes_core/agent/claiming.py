"""Giving a lease to a clone of the pool: its keeper becomes the job's, in the job's groups, under the job's limits."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

from wnodes_core import processes
from wnodes_core.agent import homes, identity
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.pool import KIND, Pool, slots_of
from wnodes_core.agent.protocol import Connection
from wnodes_core.agent.slots import Slot
from wnodes_core.errors import RequestError, TransientError, WnodesError
from wnodes_core.model import Process
from wnodes_core.pool import wire

HOLD_S = 5.0  # from the claim to the keeper's hold: far more than it takes, far less than a boot
_COMMANDS, _LONGEST = 64, 64
_VIEWS = ("mnt", "net", "user")


class Claiming:
    """The pool's part of a launch."""

    def __init__(self, daemon: Daemon, pool: Pool) -> None:
        self._daemon = daemon
        self._pool = pool

    async def slot_for(self, connection: Connection, lease: Lease, plan: dict[str, Any]) -> Slot | None:
        """A slot that fits, and is this lease's from now on."""
        if not self._pool.idle or not await self._daemon.quick(sees_the_same, connection.peer.pid):
            return None
        return self._pool.take(lease, plan.get("template"), len(plan.get("mounts", ())) + plan.get("spare_mounts", 0))

    def note(self, lease: Lease, slot: Slot) -> None:
        """Intent before effect; blocks for an fsync."""
        lease.journal.making(KIND, slot.name, template=slot.template.folder)

    async def hand_over(
        self, connection: Connection, message: dict[str, Any], lease: Lease, given: dict[str, Any], slot: Slot
    ) -> bool:
        """Tell the keeper that waits whose it is; False if it cannot be had. ``given`` is the plan and the token."""
        try:
            names = [os.path.basename(name) for name in host_commands(given, message)]
            plan = {**given["plan"], "slot": slot.folder, "host_commands": names}
            facts = await self._daemon.quick(self._prepare, connection, lease, slot)
            claim = {**given, "plan": plan, "daemon": self._daemon.settings.daemon.socket, **facts}
            wire.send(slot.control, {**claim, "trace": _trace(message)})
        except (WnodesError, OSError) as error:
            log.warning("slot %s: %s", slot.name, error, extra={"event": "pool", "lease": lease.id})
            lease.no_pool = type(error).__name__
            return False
        finally:
            slot.control.close()
        return lease.state is not State.ENDING

    def _prepare(self, connection: Connection, lease: Lease, slot: Slot) -> dict[str, Any]:
        """What a keeper has of its launcher if it is the launcher's child; blocks."""
        peer = connection.peer
        launcher = processes.read(peer.pid, command_of_users=False)
        facts = {"cpuset": sorted(os.sched_getaffinity(peer.pid)), "nice": os.getpriority(os.PRIO_PROCESS, peer.pid)}
        if launcher is None or not identity.peer_alive(peer):
            raise TransientError(f"lease {lease.id}: the launcher has gone")
        if lease.home != "step":
            return facts
        homes.join(launcher, [slot.keeper, *_of(slot)])
        return {**facts, "launcher": {"pid": launcher.pid, "started": launcher.started}}

    async def abandon(self, lease: Lease) -> None:
        """End what an earlier claim left, so that the lease is raised anew without the pool."""
        if slots_of(lease):
            await self._daemon.whole(self._abandoned(lease))

    async def _abandoned(self, lease: Lease) -> None:
        async with lease.lock:
            for resource in slots_of(lease):
                lease.no_pool = lease.no_pool or "TransientError"
                try:
                    await self._daemon.slow(self._pool.undo, resource)
                    await self._daemon.quick(lease.journal.gone, resource)
                except (WnodesError, OSError) as error:  # it stays in the journal: the lease's end tries again
                    log.warning("slot %s: %s", resource.name, error, extra={"event": "pool", "lease": lease.id})


def sees_the_same(pid: int) -> bool:
    """Whether a process has our view of files, networks and users; blocks.

    A keeper that waited has wnodesd's: for a job with a /tmp of its own it would serve another's files.
    """
    try:
        return all(os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}") for name in _VIEWS)
    except OSError:
        return False


def _of(slot: Slot) -> list[Process]:
    return [each for each in processes.table(command_of_users=False) if each.uid == slot.uid]


def host_commands(given: dict[str, Any], message: dict[str, Any]) -> list[str]:
    """What the guest may ask the host for: the site's list before the launcher's, whose commands they are."""
    if "host_commands" in given:
        return list(given["host_commands"])
    names = message.get("host_commands", [])
    ok = isinstance(names, list) and len(names) <= _COMMANDS
    if not ok or not all(isinstance(name, str) and 0 < len(name) <= _LONGEST for name in names):
        raise RequestError(f"host_commands {str(names)[:60]}: want at most {_COMMANDS} names")
    return list(names)


def _trace(message: dict[str, Any]) -> dict[str, Any] | None:
    """The launcher's part of the trace, for the user's own keeper; nothing here depends on it."""
    with suppress(KeyError, TypeError, ValueError):
        origin, now = float(message["origin"]), time.monotonic()
        if now - 3600 < origin <= now:
            return {"origin": origin, "steps": []}
    return None
