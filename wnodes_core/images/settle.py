"""Blobs and power cuts. A blob appears without waiting for the disk: that wait would double the
time of a fetch. Instead it carries a mark with the kernel's boot id until it is synced. The same
boot: the page cache is right. Another boot: the power may have gone first, so hash it again.
"""

from __future__ import annotations

import os
import time

from wnodes_core.files import sync_folder
from wnodes_core.images.hashing import digest_of
from wnodes_core.images.layout import Layout, boot_id

_WRITTEN_BACK_S = 60.0  # twice the kernel's default dirty_expire_centisecs


def sound(layout: Layout, digest: str) -> bool:
    """Whether a blob that was never synced is whole; settles it where that is cheap. Raises OSError."""
    mark = layout.fresh(digest)
    try:
        marked = mark.stat().st_mtime
        same_boot = mark.read_text().strip() == boot_id()
    except (FileNotFoundError, PermissionError):  # settled; or not ours, and its owner looks after it
        return True
    if not same_boot and digest_of(layout.blob(digest)) != digest:
        return False
    if not same_boot or time.time() - marked > _WRITTEN_BACK_S:
        settle(layout, digest)
    return True


def settle(layout: Layout, digest: str) -> None:
    """Sync a blob to the disk and take its mark away."""
    if not layout.fresh(digest).exists():
        return
    fd = os.open(layout.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(layout.blobs)
    layout.fresh(digest).unlink(missing_ok=True)
