"""The one large frame of a link: read from a file descriptor, written to the link. Runs in the guest too.

A program that writes in bulk fills whole pages of its pipe. Those go to the link by splice(2),
without a copy: under TCG, 190-240 MB/s from ``dd`` to the job's file, where read and write give 80-95.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import fcntl
import os

from wnodes_core.guest import frames

SIZE = frames.MAX_DATA
PAGES = 256 << 10
_SETPIPE, _NONBLOCK = 1031, 2  # F_SETPIPE_SZ, SPLICE_F_NONBLOCK
_LATER = (BlockingIOError, InterruptedError)


class Stage:
    """Holds one DATA frame until the link has taken it."""

    def __init__(self) -> None:
        self._bytes = memoryview(bytearray(frames.HEAD + SIZE))
        self._rest = self._bytes[:0]  # header and copied payload still to be written
        self._pages = 0  # bytes of payload that wait in the pipe
        self._reader = self._writer = -1
        self.can_splice = hasattr(os, "splice")  # Python 3.10

    @property
    def full(self) -> bool:
        """Whether a frame waits."""
        return bool(self._rest) or self._pages > 0

    def load(self, fd: int, sub: int, stream: int, limit: int, bulk: bool) -> int:
        """Read once: bytes read, 0 at the end of file. ``bulk``: whole pages are likely. Raises OSError."""
        pages = self._load_pages(fd) if bulk and self.can_splice and limit >= PAGES else 0
        if pages == PAGES:
            count = self._pages = pages
        else:
            count = self._load_copy(fd, pages, min(limit, SIZE))
        if count:
            frames.HEADER.pack_into(self._bytes, 0, frames.DATA, sub, 0, stream, count)
            self._rest = self._bytes[: frames.HEAD + count - self._pages]
        return count

    def _load_copy(self, fd: int, have: int, limit: int) -> int:
        """Read on after what the pipe already has, so that the source is drained and its next page whole."""
        begin = frames.HEAD
        if have:
            os.readv(self._reader, [self._bytes[begin : begin + have]])
        if have == limit:
            return have
        try:
            return have + os.readv(fd, [self._bytes[begin + have : begin + limit]])
        except OSError:
            if not have:
                raise
            return have

    def _load_pages(self, fd: int) -> int:
        """Move what there is into our pipe: PAGES if it can go on as it is, else it must be copied.

        Linux's virtio_console writes past its descriptors, and the guest dies, if it splices
        from a pipe that holds an empty buffer or more than is asked for. A pipe that is full
        to the last byte can hold neither.
        """
        if self._reader < 0 and not self._open():
            return 0
        try:
            return os.splice(fd, self._writer, PAGES, flags=_NONBLOCK)
        except _LATER:
            raise
        except OSError:
            self.can_splice = False  # an odd kernel or fd: copy
            return 0

    def _open(self) -> bool:
        reader, writer = os.pipe()
        try:
            size = fcntl.fcntl(writer, _SETPIPE, PAGES)
        except OSError:
            size = 0  # this user has many pipes already
        if size != PAGES:
            os.close(reader)
            os.close(writer)
            self.can_splice = False
            return False
        self._reader, self._writer = reader, writer
        return True

    def flush(self, link: int) -> None:
        """Write until all is written. Raises OSError: BlockingIOError if the link takes no more now."""
        while self._rest:
            self._rest = self._rest[os.write(link, self._rest) :]
        while self._pages:
            count = os.splice(self._reader, link, self._pages, flags=_NONBLOCK)
            if count == 0:
                raise BrokenPipeError(32, "the link took nothing")
            self._pages -= count

    def drop(self) -> None:
        """The link has gone: forget the frame."""
        self._rest = self._bytes[:0]
        self._pages = 0
        self.close()

    def close(self) -> None:
        """Let go of the pipe."""
        if self._reader >= 0:
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1
