"""Disks of a lease: qcow2 overlays on read-only images, made by qemu-img."""

from __future__ import annotations

import os

from wnodes_core.api import Disk, errors, hookimpl
from wnodes_core.tools import run

wnodes_api = 1


@hookimpl
def wnodes_disk_create(disk: Disk) -> bool | None:
    """Make an overlay; what has no base is not ours."""
    if disk.read_only or not disk.base:
        return None
    for what, path in (("disk", disk.path), ("base", disk.base)):
        if not path.startswith("/"):
            raise errors.BadFormat(f"{what} {path!r}: want an absolute path")
    if disk.format != "qcow2" or disk.base_format not in ("qcow2", "raw"):
        raise errors.BadFormat(f"overlay {disk.format!r} on {disk.base_format!r}: want qcow2 on qcow2 or raw")
    # The format of the base is always said: QEMU's guess would let a raw guest pose as qcow2.
    _qemu_img(disk.path, "-b", disk.base, "-F", disk.base_format, disk.path)
    return True


def create_blank(path: str, size_mib: int) -> None:
    """Make an empty qcow2 disk. Raises StateDirFull, LibvirtDown, ImageError."""
    _qemu_img(path, path, f"{size_mib}M")


@hookimpl
def wnodes_disk_delete(disk: Disk) -> bool | None:
    """Remove what ``wnodes_disk_create`` made; the base stays."""
    if disk.read_only or not disk.base:
        return None
    try:
        os.unlink(disk.path)
    except FileNotFoundError:
        return True
    return True


def _qemu_img(path: str, *arguments: str) -> None:
    try:
        # extended_l2: a small write takes its own 4 KiB and not a whole cluster.
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", OPTIONS, *arguments], timeout_s=30)
    except errors.CommandError as error:
        said = error.stderr_tail.strip()
        if "No space left" in said or "quota exceeded" in said:
            raise errors.StateDirFull(f"{path}: {said}", hint="free space or run wnodes image purge") from error
        if error.exit_code == 127:
            raise errors.LibvirtDown("qemu-img is missing", hint="install the package qemu-utils") from error
        raise errors.ImageError(f"disk {path}: {said or error}") from error


OPTIONS = "extended_l2=on,cluster_size=128k"
