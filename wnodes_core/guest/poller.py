"""Waiting for a link, flows and further fds. Runs in the guest too (see ``frames``)."""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import select
import stat

from wnodes_core.guest.pump import Flow, Link
from wnodes_core.guest.stage import PAGES

_FRAMES = 4  # one source's turn ends after four large frames


class Poller:
    """Waits for a link, flows and extra fds; serves what is ready, fairly."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        self._turn = 0

    def wait(self, link: Link, flows: list[Flow], extra: list[int], timeout_s: float) -> set[int]:
        """One turn: flush sinks, read sources. Returns the extra fds and the link's fd if readable.

        Raises LinkClosed.
        """
        wanted = {fd: select.POLLIN for fd in extra}
        wanted[link.fd] = select.POLLIN | (select.POLLOUT if link.pending else 0)
        owners = {}
        for flow in flows:
            for sub, source in flow.sources.items():
                if source.ready and not link.busy:
                    wanted[source.fd] = select.POLLIN
                    owners[source.fd] = (flow, sub, True)
            for sub, sink in flow.sinks.items():
                if sink.open and sink.pending:
                    wanted[sink.fd] = select.POLLOUT
                    owners[sink.fd] = (flow, sub, False)
        self._register(wanted)
        ready = dict(self._poll.poll(max(0, int(timeout_s * 1000 + 0.999))))
        if link.pending and ready.get(link.fd, 0) & ~select.POLLIN:
            link.flush()
        self._turn += 1
        order = [fd for fd in owners if fd in ready]
        turn = self._turn % max(1, len(order))
        for fd in order[turn:] + order[:turn]:
            self._serve(link, owners[fd])
        return {fd for fd in [link.fd] + extra if ready.get(fd, 0) & ~select.POLLOUT}

    def _serve(self, link: Link, owner: tuple[Flow, int, bool]) -> None:
        flow, sub, reads = owner
        if not reads:
            flow.sinks[sub].flush()
            flow.after_write(sub)
            return
        source = flow.sources[sub]
        for _ in range(_FRAMES):
            if link.busy or not source.ready or flow.read(sub) < PAGES:
                return

    def _register(self, wanted: dict[int, int]) -> None:
        for fd in [fd for fd in self._masks if fd not in wanted]:
            self._poll.unregister(fd)
            del self._masks[fd]
        for fd, mask in wanted.items():
            if self._masks.get(fd) != mask:
                self._poll.register(fd, mask)
                self._masks[fd] = mask


def private(fd: int, *, writing: bool) -> tuple[int, bool]:
    """An fd of ours for the same file that we may treat as non-blocking: (fd, whether so).

    Pipes and terminals are opened anew, because O_NONBLOCK would hit every process that
    shares the open file. Plain files keep their shared offset, and never block for long.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.dup(fd), True
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        flags = (os.O_WRONLY if writing else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open("/proc/self/fd/%d" % fd, flags), True
        except OSError:
            pass
    return os.dup(fd), False
