"""Pumps between file descriptors and frames, with credit. The same code on both sides.

A ``Link`` is one end of the channel, a ``Source`` an fd that is read and sent as DATA, a
``Sink`` an fd that DATA is written to, a ``Flow`` the sources and sinks of one stream. Runs in
the guest too (see ``frames``).
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
from collections import deque
from typing import Any

from wnodes_core.guest import frames, stage

_LATER = (BlockingIOError, InterruptedError)


class LinkClosed(Exception):
    """The other end of the link is gone."""


class Link:
    """A non-blocking fd that carries frames. At most one large frame waits in it."""

    def __init__(self, fd: int, max_control: int) -> None:
        self.fd = fd
        self.parser = frames.Parser(max_control)
        self._stage = stage.Stage()
        self._waiting: deque[Any] = deque()  # frames; None stands for the stage's

    @property
    def busy(self) -> bool:
        """Whether the large buffer is taken: read no further source."""
        return self._stage.full

    @property
    def pending(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._waiting)

    def send(self, frame: bytes) -> None:
        """Send a small frame."""
        self._waiting.append(memoryview(frame))
        if len(self._waiting) == 1:
            self.flush()

    def send_from(self, source: Source, sub: int, stream: int) -> int:
        """Read a source once and send it: bytes read, 0 at its end. Raises OSError."""
        count = self._stage.load(source.fd, sub, stream, source.credit, source.bulk)
        source.took(count)
        if count:
            self._waiting.append(None)
            if len(self._waiting) == 1:
                self.flush()
        return count

    def flush(self) -> None:
        """Write what the other end takes."""
        try:
            while self._waiting:
                if self._written(self._waiting[0]):
                    self._waiting.popleft()
        except _LATER:
            return
        except OSError:
            # The other end has gone, but may have said why: reading meets its end, after that.
            self._waiting.clear()
            self._stage.drop()

    def _written(self, view: memoryview | None) -> bool:
        """Write the first of what waits; whether it went out whole. None stands for the staged pages."""
        if view is None:
            self._stage.flush(self.fd)
            return True
        count = os.write(self.fd, view)
        if count < len(view):
            self._waiting[0] = view[count:]
        return count == len(view)

    def close(self) -> None:
        """Let go of what is ours; the fd is not."""
        self._stage.close()

    def read(self) -> Any:  # a generator of frames
        """Yield the frames that have come. Raises LinkClosed, ProtocolError."""
        space = self.parser.space()
        count = 0
        # A virtio-serial port gives at most 4 KiB a read: gather before the costly part.
        while count < len(space):
            try:
                more = os.readv(self.fd, [space[count:]])
            except _LATER:
                break
            except OSError as error:
                raise LinkClosed(os.strerror(error.errno or 0)) from error
            if more == 0 and count == 0:
                raise LinkClosed("end of file")
            count += more
            if more < 4096:
                break
        yield from self.parser.received(count)


class Source:
    """An fd whose bytes are sent while there is credit."""

    def __init__(self, fd: int, credit: int = 0) -> None:
        self.fd = fd
        self.credit = 0
        self.open = True
        self.bulk = False  # it gives much at a time: whole pages are worth waiting for
        self._most = 0
        self.grant(credit)

    @property
    def ready(self) -> bool:
        """Whether it may be read now."""
        return self.open and self.credit >= (stage.PAGES if self.bulk else 1)

    def grant(self, amount: int) -> None:
        """So many more bytes may be sent."""
        self.credit += amount
        self._most = max(self._most, self.credit)

    def took(self, count: int) -> None:
        """So many were read: is it a program that writes in bulk?"""
        self.credit -= count
        # A window of four frames: three quarters of it come back at the latest (see Sink), so
        # that waiting for one frame's credit ends.
        if count >= stage.PAGES:
            self.bulk = self._most >= 4 * stage.PAGES
        elif count < stage.PAGES // 8:
            self.bulk = False

    def close(self) -> None:
        """Read no more."""
        if self.open:
            self.open = False
            os.close(self.fd)


class Sink:
    """An fd that bytes are written to, in order; what it does not take at once waits, bounded by credit."""

    def __init__(self, fd: int, window: int, *, whole: bool = True) -> None:
        self.fd = fd
        self.open = True
        self.broken = False
        self.written = 0
        self._whole = whole  # False: the fd may block, so write little and only when poll says so
        self._ending = False
        self._backlog: deque[bytes] = deque()
        self._window = window
        self._owed = 0

    @property
    def pending(self) -> bool:
        """Whether bytes wait for the fd."""
        return bool(self._backlog)

    def write(self, data: memoryview) -> None:
        """Write or keep; a reader that has gone is remembered in ``broken``."""
        if not self.open:
            self._owed += len(data)
            return
        if not self._backlog and self._whole:
            data = data[self._put(data) :]
        if len(data) and self.open:
            self._backlog.append(bytes(data))

    def _put(self, data: memoryview | bytes) -> int:
        try:
            count = os.write(self.fd, data if self._whole else data[:4096])
        except _LATER:
            return 0
        except OSError:  # EPIPE; on a file also ENOSPC, EIO: the producer sees a closed pipe
            self.broken = True
            self._owed += len(data) + sum(map(len, self._backlog))
            self._backlog.clear()
            self.close()
            return len(data)
        self._owed += count
        self.written += count
        return count

    def flush(self) -> None:
        """Go on with what waits."""
        while self._backlog:
            data = self._backlog[0]
            count = self._put(data)
            if not self.open:
                return
            if count < len(data):
                self._backlog[0] = data[count:]
                return
            self._backlog.popleft()
            if not self._whole:
                break
        if self._ending and not self._backlog:
            self.close()

    def finish(self) -> None:
        """End of file, once all is written."""
        self._ending = True
        if not self._backlog:
            self.close()

    def take_credit(self) -> int:
        """Bytes to grant again, 0 while too few for a frame of their own."""
        if self._owed * 4 < self._window and not self.broken:
            return 0
        owed, self._owed = self._owed, 0
        return owed

    def close(self) -> None:
        """Write no more."""
        if self.open:
            self.open = False
            os.close(self.fd)


class Flow:
    """The sources and sinks of one stream."""

    def __init__(self, link: Link, stream: int, sources: dict[int, Source], sinks: dict[int, Sink]) -> None:
        self.link = link
        self.stream = stream
        self.sources = sources
        self.sinks = sinks
        self._told: set[int] = set()

    def on_frame(self, kind: int, sub: int, payload: memoryview) -> None:
        """Take a DATA, EOF, CREDIT or SHUT frame; others are not for us."""
        if kind == frames.DATA and sub in self.sinks:
            self.sinks[sub].write(payload)
            self.after_write(sub)
        elif kind == frames.EOF and sub in self.sinks:
            self.sinks[sub].finish()
        elif kind == frames.CREDIT and sub in self.sources:
            self.sources[sub].grant(frames.amount_of(bytes(payload)))
        elif kind == frames.SHUT and sub in self.sources:
            self.sources[sub].close()

    def after_write(self, sub: int) -> None:
        """Grant what was consumed; tell once that the consumer is gone."""
        sink = self.sinks[sub]
        amount = sink.take_credit()
        if amount:
            self.link.send(frames.credit(sub, self.stream, amount))
        if sink.broken and sub not in self._told:
            self._told.add(sub)
            self.link.send(frames.pack(frames.SHUT, sub, self.stream))

    def read(self, sub: int) -> int:
        """Send from one source; -1 when it has nothing now, 0 at its end (EOF is sent)."""
        source = self.sources[sub]
        try:
            count = self.link.send_from(source, sub, self.stream)
        except _LATER:
            return -1
        except OSError:  # EIO: the last process of a terminal has gone
            count = 0
        if count == 0:
            source.close()
            self.link.send(frames.pack(frames.EOF, sub, self.stream))
        return count

    def close(self) -> None:
        """Let go of every fd."""
        for end in list(self.sources.values()) + list(self.sinks.values()):
            end.close()
