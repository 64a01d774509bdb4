"""The keeper follows the launcher whose lease it holds: into its end, and where it is stopped.

A batch system may stop a job by SIGSTOP, which nobody can catch. Keeper and QEMU are in sessions of
their own, so that a signal to the job's process group leaves the user's grace to the guest; they have
to see for themselves that the launcher was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable

from wnodes_core.errors import WnodesError

CHECK_S = 1.0


def to_the_end(launcher: int, is_launcher: Callable[[int], bool], then: Callable[[], None]) -> None:
    """Call ``then`` when the launcher ends, also one that is killed before it has connected; needs the running loop."""
    try:
        fd = os.pidfd_open(launcher)
    except ProcessLookupError:
        fd = -1
    if not is_launcher(launcher):  # it has gone, and its pid may be another's
        then()
    if fd >= 0:
        asyncio.get_running_loop().add_reader(fd, _ended, fd, then)


def _ended(fd: int, then: Callable[[], None]) -> None:
    asyncio.get_running_loop().remove_reader(fd)
    os.close(fd)
    then()


def stopped(pid: int) -> bool:
    """Whether this process is stopped by a signal (proc(5): state T)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


async def stops(launcher: int, pause: Callable[[bool], Awaitable[None]]) -> None:
    """Pause the VM while the launcher is stopped, and only then; until cancelled.

    Told again each time: a VM may have come up meanwhile.
    """
    was = False
    while True:
        await asyncio.sleep(CHECK_S)
        now = stopped(launcher)
        if now or was:
            with contextlib.suppress(WnodesError):  # no VM (yet, any more): nothing runs on
                await pause(now)
        was = now
