"""Scratch: an empty disk of the lease's own with an ext4 file system; a file here, or what root has made a node for.

A raw file has all its room set aside (fallocate(2)), so that a job that fills its scratch gets ENOSPC and the
node's file system has what it had before; a file that grows with the guest's writes could fill the node, and
then every guest would see I/O errors. A qcow2 file does just that: it is for file systems that can set nothing
aside. No journal and no reserve: it is never used again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from wnodes_core.api import Disk, errors, hookimpl
from wnodes_core.tools import run

wnodes_api = 1

_KEEP_FREE = 1 << 30  # for the node: a journal of ours that cannot be written drains it
_MKFS = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", "scratch"]
# Root of the guest owns the top; tables are zero already, or never read before they are written (uninit_bg).
_FEATURES = ["-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0,nodiscard,lazy_itable_init=1"]
# All of its tables are made at once: a scratch is written from end to end. Larger clusters, smaller tables.
_QCOW2 = ["-f", "raw", "-O", "qcow2", "-o", "preallocation=metadata,cluster_size=256k"]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@hookimpl
def wnodes_disk_create(disk: Disk) -> bool | None:
    """Make the file, exactly as large as asked, with an empty file system on it."""
    if not _ours(disk):
        return None
    with _opened(disk) as fd:
        if disk.block:
            _made_file_system(fd, disk)
        else:
            _made_file(fd, disk)
    return True


@hookimpl
def wnodes_disk_delete(disk: Disk) -> bool | None:
    """Remove the file; what stands in its place and is none of ours stays. A node is root's to remove."""
    if not _ours(disk):
        return None
    with suppress(FileNotFoundError):
        if stat.S_ISREG(os.lstat(disk.path).st_mode):
            os.unlink(disk.path)
    return True


def _ours(disk: Disk) -> bool:
    return bool(disk.size_mib) and not disk.base and disk.format in (("raw",) if disk.block else ("raw", "qcow2"))


@contextmanager
def _opened(disk: Disk) -> Iterator[int]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if disk.block else os.O_CREAT | os.O_EXCL)
    try:
        fd = os.open(disk.path, flags, 0o600)
    except OSError as error:
        hint = "scratch: {folder: …} names a folder where users may make files (mode 1777)"
        if disk.block:
            hint = "its node was made for the job's user: is /dev mounted nodev?"
        raise errors.HostError(f"scratch {disk.path}: {error.strerror}", hint=hint) from error
    try:
        if disk.block and not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise errors.HostError(f"scratch {disk.path}: no block device")
        yield fd
    finally:
        os.close(fd)


def _made_file(fd: int, disk: Disk) -> None:
    try:
        _set_aside(fd, disk)
        if disk.format == "raw":
            _made_file_system(fd, disk)
        else:
            _made_qcow2(fd, disk)
    except errors.WnodesError:
        with suppress(OSError):
            os.unlink(disk.path)
        raise


def _set_aside(fd: int, disk: Disk) -> None:
    """The room of the file, or for one that grows at least the hope of it. Raises HostBusy, HostError."""
    try:
        found = os.fstatvfs(fd)
        if found.f_bavail * found.f_frsize < (disk.size_mib << 20) + _KEEP_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if disk.format == "raw":
            os.posix_fallocate(fd, 0, disk.size_mib << 20)
    except OSError as error:
        if error.errno in _FULL:
            raise _busy(disk, str(error.strerror)) from error
        hint = "scratch: {format: qcow2} needs no room set aside" if error.errno == errno.EOPNOTSUPP else ""
        raise errors.HostError(f"scratch {disk.path}: {error.strerror}", hint=hint) from error


def _made_file_system(fd: int, disk: Disk) -> None:
    try:
        # By its descriptor: in a folder that others may write to, the name could be another's by now.
        run([*_MKFS, *_FEATURES, f"/proc/{os.getpid()}/fd/{fd}"], timeout_s=60)
    except errors.CommandError as error:
        hint = "install e2fsprogs" if error.exit_code == 127 else ""
        raise errors.HostError(f"scratch {disk.path}: no file system could be made: {error}", hint=hint) from error


def _made_qcow2(fd: int, disk: Disk) -> None:
    """The file system is made in memory, where only what is written takes room, and brought into the file."""
    memory = os.memfd_create("scratch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, disk.size_mib << 20)
        _made_file_system(memory, disk)
        me = os.getpid()
        run(["qemu-img", "convert", *_QCOW2, f"/proc/{me}/fd/{memory}", f"/proc/{me}/fd/{fd}"], timeout_s=120)
    except errors.CommandError as error:
        if "No space left" in error.stderr_tail or "quota exceeded" in error.stderr_tail:
            raise _busy(disk, "No space left on device") from error
        hint = "install qemu-utils (EL: qemu-img)" if error.exit_code == 127 else ""
        raise errors.HostError(f"scratch {disk.path}: {error}", hint=hint) from error
    finally:
        os.close(memory)


def _busy(disk: Disk, why: str) -> errors.HostBusy:
    text = f"scratch of {disk.size_mib} MiB: {why} in {os.path.dirname(disk.path)}"
    return errors.HostBusy(text, hint="ask for less scratch")
