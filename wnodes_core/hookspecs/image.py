"""Hooks for image sources and for a lease's disks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Disk, Image


@hookspec(firstresult=True)
def wnodes_image_fetch(source: str, into: Path, deadline: float, progress: Callable[[int, int], None]) -> bool | None:
    """Called to bring one source of an image into the store's private partial file.

    :param source: an URL or an absolute path from the catalogue.
    :param into: the file to write or to go on with; what is already there is a valid prefix.
    :param deadline: ``time.monotonic()`` value after which to give up.
    :param progress: call it with (bytes so far, bytes in all or 0), and with a smaller number
        *before* cutting the file: it is being hashed through a map.
    :returns: True when the file is complete, None if this source is of another kind.
    :raises FetchError: this source cannot deliver; the next one is tried.
    """


@hookspec
def wnodes_image_verify(image: Image) -> None:
    """Called when an image has arrived and on demand, after its digest was checked.

    :param image: the image as it lies in the store.
    :raises ImageError: to refuse it (a signature, a scan, an age).
    """


@hookspec(firstresult=True)
def wnodes_disk_create(disk: Disk) -> bool | None:
    """Called to make one disk of a lease: an overlay on a read-only base, or a blank file.

    :param disk: where, in which format, on which base.
    :returns: True when made, None if this disk is for another provider.
    :raises HostError: the file system is full or broken.
    """


@hookspec(firstresult=True)
def wnodes_disk_delete(disk: Disk) -> bool | None:
    """Called to remove a disk; idempotent.

    :param disk: as given to ``wnodes_disk_create``.
    :returns: True when it is gone, None if it is another provider's.
    """
