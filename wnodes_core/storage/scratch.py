"""Scratch: an empty disk of the lease's own, a raw file with an ext4 file system and all its room set aside.

Set aside (fallocate(2)), so that a job that fills its scratch gets ENOSPC and the node's file
system has what it had before; a file that grew with the guest's writes could fill the node, and
then every guest would see I/O errors. No journal and no reserve: it is never used again.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from wnodes_core.api import Disk, errors, hookimpl
from wnodes_core.tools import run

wnodes_api = 1

_KEEP_FREE = 1 << 30  # for the node: a journal of ours that cannot be written drains it
_MKFS = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "scratch"]
# Root of the guest owns the top; tables are zero already, as the file is new.
_FEATURES = ["-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0,nodiscard,lazy_itable_init=1"]


@hookimpl
def wnodes_disk_create(disk: Disk) -> bool | None:
    """Make the file, exactly as large as asked, with an empty file system on it."""
    if not disk.size_mib or disk.base or disk.format != "raw":
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(disk.path, flags, 0o600)
    except OSError as error:
        hint = "scratch: {folder: …} names a folder where users may make files (mode 1777)"
        raise errors.HostError(f"scratch {disk.path}: {error.strerror}", hint=hint) from error
    try:
        _set_aside(fd, disk)
        # By its descriptor: in a folder that others may write to, the name could be another's by now.
        run([*_MKFS, *_FEATURES, f"/proc/{os.getpid()}/fd/{fd}"], timeout_s=60)
    except errors.CommandError as error:
        hint = "install e2fsprogs" if error.exit_code == 127 else ""
        raise errors.HostError(f"scratch {disk.path}: no file system could be made: {error}", hint=hint) from error
    finally:
        os.close(fd)
    return True


def _set_aside(fd: int, disk: Disk) -> None:
    found = os.fstatvfs(fd)
    try:
        if found.f_bavail * found.f_frsize < (disk.size_mib << 20) + _KEEP_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, disk.size_mib << 20)
    except OSError as error:
        with suppress(OSError):
            os.unlink(disk.path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text = f"scratch of {disk.size_mib} MiB: {error.strerror} in {os.path.dirname(disk.path)}"
            raise errors.HostBusy(text, hint="ask for less scratch") from error
        raise errors.HostError(f"scratch {disk.path}: {error.strerror}") from error


@hookimpl
def wnodes_disk_delete(disk: Disk) -> bool | None:
    """Remove the file; what stands in its place and is none of ours stays."""
    if not disk.size_mib or disk.base or disk.format != "raw":
        return None
    with suppress(FileNotFoundError):
        if stat.S_ISREG(os.lstat(disk.path).st_mode):
            os.unlink(disk.path)
    return True
