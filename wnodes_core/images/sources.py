"""Image sources that come with us: ``http://``, ``https://`` and absolute paths."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from wnodes_core.api import errors, hookimpl
from wnodes_core.tools import full_disk_is_host_error

wnodes_api = 1

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_STEP = 32 << 20
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM)
_NO_COPY_RANGE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS)


@hookimpl
def wnodes_image_fetch(source: str, into: Path, deadline: float, progress: Callable[[int, int], None]) -> bool | None:
    """Fetch what we know how to fetch."""
    if source.startswith(("http://", "https://")):
        from wnodes_core.images import web  # 12 ms of http.client, which a keeper never needs

        web.fetch(source, into, deadline, progress)
        return True
    if source.startswith("/"):
        copy(source, into, deadline, progress)
        return True
    return None


def copy(source: str, into: Path, deadline: float, progress: Callable[[int, int], None]) -> None:
    """Copy a file within the kernel; blocks are shared where the file system can, holes are kept.

    Raises FetchError, StateDirFull.
    """
    try:
        # O_NONBLOCK: a FIFO in the file's place must not hang us.
        src = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise errors.FetchError(f"{source}: {error.strerror}") from error
    try:
        before = os.fstat(src)
        if not stat.S_ISREG(before.st_mode):
            raise errors.FetchError(f"{source}: want a regular file, found {stat.filemode(before.st_mode)}")
        with full_disk_is_host_error(into.parent):
            _copy(src, before, into, deadline, progress)
        after = os.fstat(src)
        if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
            raise errors.FetchError(f"{source}: it changed while it was read")
    finally:
        os.close(src)


def need_room(into: Path, count: int) -> None:
    """See that ``count`` more bytes fit, before the disk is filled for nothing.

    Raises OSError (no space left), LimitExceeded for what no purge can make room for.
    """
    room = os.statvfs(into.parent)
    if count > room.f_blocks * room.f_frsize:
        raise errors.LimitExceeded(
            f"{into.parent}: the image has {count} bytes, the whole file system {room.f_blocks * room.f_frsize}"
        )
    if count > room.f_bavail * room.f_frsize:
        raise OSError(errno.ENOSPC, f"no space left for {count} bytes more", str(into.parent))


def _copy(src: int, found: os.stat_result, into: Path, deadline: float, progress: Callable[[int, int], None]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    progress(0, found.st_size)
    dst = os.open(into, flags, 0o600)
    try:
        if _reflink(src, dst):
            progress(found.st_size, found.st_size)
            return
        need_room(into, found.st_blocks * 512)
        os.ftruncate(dst, found.st_size)
        for offset, count in _data(src, found.st_size):
            _copy_range(src, dst, offset, count)
            progress(offset + count, found.st_size)
            if time.monotonic() > deadline:
                raise errors.FetchError(f"{into.name[:12]}: not copied in time")
    finally:
        os.close(dst)
    progress(found.st_size, found.st_size)


def _reflink(src: int, dst: int) -> bool:
    try:
        fcntl.ioctl(dst, _FICLONE, src)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
        return False
    return True


def _data(src: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of a file that hold data, none longer than a step."""
    end = 0
    while end < size:
        try:
            start = os.lseek(src, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(src, start, os.SEEK_HOLE)
        yield from ((offset, min(_STEP, end - offset)) for offset in range(start, end, _STEP))


def _copy_range(src: int, dst: int, offset: int, count: int) -> None:
    while count:
        try:
            done = os.copy_file_range(src, dst, count, offset, offset)
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE:
                raise
            done = os.pwrite(dst, os.pread(src, min(count, 1 << 20), offset), offset)
        if done == 0:
            return  # cut short meanwhile; the caller sees that it changed
        offset += done
        count -= done
