"""Where a store keeps what, and the locks on it.

::

    blobs/sha256/HEX   verified, read-only; the time of last use is its mtime
    fresh/HEX          this blob may not be on the disk's platters yet (see ``settle``)
    partial/HEX        a fetch under way, or what a killed one left to go on with
    locks/HEX          who fetches (flock); holds the size to come, or how the last fetch failed
    use/HEX/LEASE      a lease boots from it
    catalogue/NAME.json
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from wnodes_core.errors import FetchError
from wnodes_core.files import full_disk_is_host_error

_POLL_S = 0.05


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def catalogue(self) -> Path:
        """One JSON file an image name."""
        return self.root / "catalogue"

    @property
    def blobs(self) -> Path:
        """The verified files."""
        return self.root / "blobs" / "sha256"

    def blob(self, digest: str) -> Path:
        """The file of a digest, there or not."""
        return self.blobs / digest.removeprefix("sha256:")

    def partial(self, name: str) -> Path:
        """Where a fetch of that digest (or of that made-up name) is written."""
        return self.root / "partial" / name.removeprefix("sha256:")

    def lock(self, name: str) -> Path:
        """The lock file of a digest, or of ``catalogue``."""
        return self.root / "locks" / name.removeprefix("sha256:")

    def use(self, digest: str) -> Path:
        """The folder of the leases that use a digest."""
        return self.root / "use" / digest.removeprefix("sha256:")

    def fresh(self, digest: str) -> Path:
        """The mark of a blob that was never synced."""
        return self.root / "fresh" / digest.removeprefix("sha256:")

    def make(self) -> None:
        """Make the folders. The node's store is there to be read by all, a user's is private."""
        open_mode = 0o755 if os.geteuid() == 0 else 0o700
        with full_disk_is_host_error(self.root):
            for folder in (self.root, self.blobs.parent, self.blobs, self.catalogue):
                _make(folder, open_mode)
            for name in ("partial", "locks", "use", "fresh"):
                _make(self.root / name, 0o700)


def _make(folder: Path, mode: int) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, mode)


@contextmanager
def locked(path: Path, *, deadline: float, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the exclusive lock of ``path``; ``waiting`` is called now and then until it is had.

    Kernel locks end with their process, so a killed holder blocks nobody.

    Raises FetchError when ``deadline`` (``time.monotonic()``) passes first.
    """
    fd = try_lock(path)
    while fd is None:
        if time.monotonic() > deadline:
            raise FetchError(f"{path.name[:12]}: another process is at it and did not finish in time")
        waiting()
        time.sleep(_POLL_S)
        fd = try_lock(path)
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """The lock of ``path`` as an open file, or None while somebody else has it."""
    while True:
        with full_disk_is_host_error(path.parent):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # A purge may have removed the file between our open and our lock: then take the new one.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)


def boot_id() -> str:
    """The kernel's name for this boot; another one means that the page cache was lost."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
