"""Disks of a lease: qcow2 overlays on read-only images, made by qemu-img."""

from __future__ import annotations

import os
import shutil
import struct
from contextlib import suppress

from wnodes_core.api import Disk, errors, hookimpl
from wnodes_core.tools import run

wnodes_api = 1
_PIECE = 1 << 20


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
    if disk.blank and _copied(disk.blank, disk.path):
        return True
    # The format of the base is always said: QEMU's guess would let a raw guest pose as qcow2.
    _qemu_img(disk.path, "-b", disk.base, "-F", disk.base_format, disk.path)
    return True


def blank_for(disk: str, path: str) -> None:
    """Make the empty overlay that clones of a template copy: one for the qcow2 file ``disk``.

    It names no file below it, for a template moves: whoever runs on a copy says what lies there, as our
    backends always do. Raises StateDirFull, LibvirtDown, ImageError; OSError if ``disk`` cannot be read.
    """
    with open(disk, "rb") as file:
        magic, size = struct.unpack(">4s20xQ", file.read(32))
    if magic != b"QFI\xfb":  # docs/interop/qcow2.txt
        raise errors.BadFormat(f"disk {disk}: want qcow2")
    _qemu_img(path, path, str(size))


def _copied(blank: str, path: str) -> bool:
    """Copy an empty overlay, 0.4 MiB, in a thirtieth of the time that qemu-img takes; False if it cannot be."""
    try:
        with open(blank, "rb") as source, open(path, "xb") as copy:
            os.fchmod(copy.fileno(), 0o600)
            shutil.copyfileobj(source, copy, _PIECE)
        return True
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return False


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
