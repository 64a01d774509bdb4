"""Ending whole sessions of processes in the guest: a command and what it left running. Part of the agent."""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import signal
import time

from wnodes_core.guest import guest_exec

KILL_AFTER_S = 2.0
SWEEP_AFTER_S = 0.2


class Endings:
    """The sessions whose end is due, and when."""

    def __init__(self) -> None:
        self._to_kill: list[tuple[float, int]] = []  # (when, session)

    def __len__(self) -> int:
        return len(self._to_kill)

    def due(self) -> float:
        """When the next is due, on the monotonic clock; half a minute from now if none is."""
        return min([when for when, _ in self._to_kill], default=time.monotonic() + 30)

    def hang_up(self, session: int) -> None:
        """Its launcher has gone: end a command and its background jobs, first kindly."""
        for pid in guest_exec.session_members({session}):
            _kill(pid, signal.SIGHUP)
            _kill(pid, signal.SIGCONT)
        self._to_kill.append((time.monotonic() + KILL_AFTER_S, session))

    def sweep(self, session: int) -> None:
        """Its leader has ended: end soon what it left running."""
        self._to_kill.append((time.monotonic() + SWEEP_AFTER_S, session))

    def kill_due(self) -> None:
        """End the sessions that are due."""
        now = time.monotonic()
        due = {session for when, session in self._to_kill if when <= now}
        if due:
            self._to_kill = [entry for entry in self._to_kill if entry[1] not in due]
            _kill_members(due)

    def kill_all(self, more: set[int]) -> None:
        """End every session, due or not, and ``more``."""
        _kill_members(more | {session for _, session in self._to_kill})


def _kill_members(sessions: set[int]) -> None:
    for pid in guest_exec.session_members(sessions):
        _kill(pid, signal.SIGKILL)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass
