"""The one door to files in folders that others may write: no link is ever followed.

Everything durable is written to a temporary name, synced and renamed, so that a reader or a
crash sees the old text or the new one, never half of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wnodes_core.errors import HostError, StateDirFull

_FULL = (errno.ENOSPC, errno.EDQUOT)
# linux/openat2.h, Linux 5.6; the number is the same on every architecture but alpha.
_OPENAT2, _NO_XDEV, _NO_LINKS, _BENEATH = 437, 0x01, 0x04, 0x08


@contextmanager
def full_disk_is_host_error(path: str | Path) -> Iterator[None]:
    """Turn "no space left" below ``path`` into a StateDirFull that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StateDirFull(f"{path}: {error.strerror}", hint="free space or run wnodes image purge") from error
        raise


def write_atomic(path: str | Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: whole or not at all, on disk when this returns.

    Raises StateDirFull, OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with full_disk_is_host_error(path.parent):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    sync_folder(path.parent)


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def private_folder(path: str | Path, *, uid: int | None = None, gid: int = -1) -> Path:
    """Make (or accept) a folder of mode 0700 that belongs to ``uid`` (default: us).

    Raises HostError if something else already has the name: a link, a file, another owner.
    """
    path = Path(path)
    wanted = os.getuid() if uid is None else uid
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
        if wanted != os.getuid():
            os.chown(path, wanted, gid, follow_symlinks=False)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != wanted or found.st_mode & 0o077:
        seen = f"uid {found.st_uid}, {stat.filemode(found.st_mode)}"
        raise HostError(f"{path}: want a folder of mode 0700 owned by uid {wanted}, found {seen}")
    return path


def remove_tree(path: str | Path) -> None:
    """Remove a folder and all in it; links are removed, not followed; absent is fine.

    Raises OSError for what could not be removed.
    """
    try:
        shutil.rmtree(path)  # fd based on Linux: shutil.rmtree.avoids_symlink_attacks
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(path)
    except RecursionError:
        raise OSError(errno.ELOOP, "folders nested too deeply", str(path)) from None


def read_tail(path: str | Path, limit: int) -> str:
    """The last ``limit`` bytes of a file as text, or '' if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        return file.read(limit).decode(errors="replace")


def read_beneath(folder: str | Path, name: str, *, limit: int) -> bytes:
    """The first ``limit`` bytes of a regular file in a folder that is a user's, who may have put anything there.

    No link, mount, device or pipe is followed or waited for; what the bytes say is the user's word.

    Raises OSError.
    """
    base = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _open_here(base, name)
    finally:
        os.close(base)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        return file.read(limit)


def _open_here(base: int, name: str) -> int:
    """openat2(2) beneath ``base``, across no link and no mount: another's file system may never answer."""
    import ctypes

    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    how = (ctypes.c_uint64 * 3)(flags, 0, _NO_XDEV | _NO_LINKS | _BENEATH)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_OPENAT2, base, os.fsencode(name), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return int(fd)
