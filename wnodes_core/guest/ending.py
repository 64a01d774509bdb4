"""A process that stands for another: its stdio kept free, its ending the other's."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Exit:
    """How the command ended: a code, or the signal it died of. ``error`` says why it never started."""

    code: int = 0
    signal: int = 0
    core: bool = False
    error: str = ""


def reserve_stdio() -> tuple[int, ...]:
    """Put /dev/null on those of fds 0-2 that are closed, and return which; call it first of all.

    Otherwise our own next file would become the command's stdin.
    """
    closed = []
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            closed.append(fd)
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
    return tuple(closed)


def die_like(ending: Exit) -> None:
    """End this process as the command ended: same code, or same signal (without a core of ours)."""
    if ending.signal:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ending.signal not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ending.signal, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [ending.signal])
        os.kill(os.getpid(), ending.signal)
        os._exit(128 + ending.signal)  # a signal whose default is to be ignored
    os._exit(ending.code)
