"""Digests: of a file at rest, and of a file that still grows, so that no fetch is read twice."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK = 1 << 18
_WINDOW = 8 << 20


def digest_of(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The digest of a file's bytes, as ``sha256:HEX``. Raises OSError."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    done = 0
    with open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            done += count
            progress(done, total)
    return f"sha256:{hasher.hexdigest()}"


class Follower:
    """Hashes a file behind the back of whoever writes it, in a thread of its own.

    ``announce(n)`` says that the first n bytes are there; a smaller n than before says that the
    writer will start over, and must be said before the file is cut. A source from a plug-in
    needs not know that its file is hashed while it writes.

    The file is read through a map of the page cache: a copy by ``pread`` costs as much as the
    hash itself. A map of bytes that were cut away would be deadly, hence ``_window``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._window = threading.Lock()
        self._there = 0
        self._restart = False
        self._last = False
        self._result = ""
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def announce(self, there: int) -> None:
        """Say how much of the file is written; returns once no more than that is read."""
        with self._changed:
            less = there < self._there
            self._restart |= less
            self._there = there
            self._changed.notify()
        if less:
            with self._window:
                pass

    def finish(self) -> str:
        """The digest of the whole file, now that it is complete. '' if it could not be read."""
        self.announce(os.stat(self._path).st_size)
        self.stop()
        return self._result

    def stop(self) -> None:
        """End the thread; needed on every path."""
        with self._changed:
            self._last = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        hasher, done, fd = hashlib.sha256(), 0, -1
        try:
            while not self._finished(done):
                if fd < 0:
                    fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with self._window:
                    if self._starts_over():
                        hasher, done = hashlib.sha256(), 0
                    done += _hash_window(hasher, fd, done, self._there)
            self._result = f"sha256:{hasher.hexdigest()}"
        except (OSError, ValueError):  # ValueError: shorter than announced, says mmap
            return  # no result: the caller reads the file itself
        finally:
            if fd >= 0:
                os.close(fd)

    def _finished(self, done: int) -> bool:
        """Wait for more to do; True when there is no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._there > done or self._restart or self._last)
            return self._last and not self._restart and done >= self._there

    def _starts_over(self) -> bool:
        with self._changed:
            restart, self._restart = self._restart, False
            return restart


def _hash_window(hasher: Any, fd: int, start: int, end: int) -> int:
    """Hash from ``start`` on, at most a window and not beyond ``end``; how many bytes."""
    base = start - start % mmap.ALLOCATIONGRANULARITY
    length = min(end - base, _WINDOW)
    if base + length <= start:
        return 0
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    with (
        mmap.mmap(fd, length, flags, mmap.PROT_READ, offset=base) as window,
        memoryview(window) as view,
        view[start - base :] as part,
    ):
        hasher.update(part)
    return base + length - start
