"""Helping libvirt to see a QEMU end: it waits until its pid is free, in a process that does not reap it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wnodes_core.api import Process
from wnodes_core.tools import kill

_EACH_S = 0.02


@contextmanager
def reaping(ends: Process | None = None) -> Iterator[None]:
    """Reap the QEMUs that libvirt ends, those that it starts only to ask them what they can too.

    They daemonise, and the keeper is the subreaper they fall to. libvirt ends each by a signal and
    waits until its pid is free, which a zombie's is not: 20 s a probe, 40 s in all (measured).
    ``ends`` is one of a VM, deaf to the signal: as soon as libvirt has sent it, it is killed.
    """
    done = threading.Event()

    def reap() -> None:
        while not done.wait(_EACH_S):
            if ends and _told_to_end(ends.pid):
                kill(ends)
            for pid in _dead():
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    thread = threading.Thread(target=reap, name="qemu-reaper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _told_to_end(pid: int) -> bool:
    """Whether a SIGTERM waits for a process that blocks it (proc(5), ShdPnd)."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _dead() -> Iterator[int]:
    # Not libvirt's own children, which it reaps itself: what has daemonised is in a session of its own.
    ours = str(os.getsid(0))
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):
            for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")[2].rpartition(") ")
                fields = rest.split()
                if name.startswith(("qemu-system", "qemu-kvm")) and fields[0] == "Z" and fields[3] != ours:
                    yield int(pid)
