"""Making room in a store: what no image names, what is old, and the least recently used.

Never removed: what is in use, what was used a moment ago, and the only copy of an image (no
source, or a source path that is gone). An image's entry stays; its next use fetches it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wnodes_core.images import flight, settle, use
from wnodes_core.images.catalogue import Entry
from wnodes_core.images.layout import Layout, try_lock

if TYPE_CHECKING:
    from wnodes_core.settings import PurgeSettings

GRACE_S = 600.0  # between a fetch and the mark of the lease that asked for it
ORPHAN_S = 3600.0
STALE_PARTIAL_S = 86400.0


@dataclass(frozen=True)
class Purged:
    """One file that a purge removed, or would remove."""

    digest: str
    names: tuple[str, ...]
    size_bytes: int
    reason: str


@dataclass(frozen=True)
class _Blob:
    digest: str
    names: tuple[str, ...]
    size_bytes: int
    idle_s: float
    replaceable: bool

    def purged(self, reason: str) -> Purged:
        return Purged(self.digest, self.names, self.size_bytes, reason)


def disk_use(path: Path) -> tuple[int, int]:
    """(bytes used, bytes in all) of the file system, as df counts them for ordinary users."""
    room = os.statvfs(path)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize
    return used, used + room.f_bavail * room.f_frsize


def purge(
    layout: Layout,
    entries: Iterable[Entry],
    settings: PurgeSettings,
    *,
    dry_run: bool = False,
    usage: Callable[[Path], tuple[int, int]] = disk_use,
    now: float | None = None,
) -> list[Purged]:
    """Remove what the settings no longer want; what that was. Raises OSError."""
    if not layout.blobs.is_dir():
        return []
    moment = time.time() if now is None else now
    gone = list(_stale_partials(layout, moment, dry_run))
    blobs = _blobs(layout, list(entries), moment)
    chosen = list(_by_age(blobs, settings))
    taken = {one.digest for one in chosen}
    rest = [blob for blob in blobs if blob.digest not in taken]
    still_there = (*gone, *chosen) if dry_run else chosen
    freed = sum(one.size_bytes for one in still_there)
    chosen += _by_watermark(rest, settings, usage(layout.root), freed)
    if not dry_run:
        chosen = [one for one in chosen if _remove(layout, one.digest)]
        _tidy(layout)
    return gone + chosen


def orphans(layout: Layout, entries: Iterable[Entry], digests: Collection[str]) -> list[Purged]:
    """Remove those of ``digests`` that no entry names and nobody uses."""
    named = {digest for entry in entries for digest in entry.digests}
    gone = []
    for digest in digests:
        size = _size(layout.blob(digest))
        if digest not in named and not use.user_of(layout, digest) and _remove(layout, digest):
            gone.append(Purged(digest, (), size, "removed"))
    return gone


def _blobs(layout: Layout, entries: list[Entry], now: float) -> list[_Blob]:
    """All blobs that may go if there is a reason, the longest idle first."""
    found = []
    for path in layout.blobs.iterdir():
        digest = f"sha256:{path.name}"
        namers = [entry for entry in entries if digest in entry.digests]
        with suppress(FileNotFoundError):
            size, idle_s = _size(path), now - path.stat().st_mtime
            if idle_s > GRACE_S and not use.user_of(layout, digest):
                sources = {s for e in namers for p in e.parts if p.digest == digest for s in p.sources}
                replaceable = any(_reachable(source, path) for source in sources)
                found.append(_Blob(digest, tuple(map(str, namers)), size, idle_s, replaceable))
    return sorted(found, key=lambda blob: -blob.idle_s)


def _reachable(source: str, blob: Path) -> bool:
    if not source.startswith("/"):
        return True
    try:
        return os.stat(source).st_size == blob.stat().st_size
    except OSError:
        return False


def _by_age(blobs: Iterable[_Blob], settings: PurgeSettings) -> Iterator[Purged]:
    for blob in blobs:
        if not blob.names and blob.idle_s > ORPHAN_S:
            yield blob.purged("no image names it")
        elif blob.replaceable and 0 < settings.max_age_days * 86400 < blob.idle_s:
            yield blob.purged(f"not used for {blob.idle_s / 86400:.0f} days")


def _by_watermark(
    blobs: Iterable[_Blob], settings: PurgeSettings, usage: tuple[int, int], freed: int
) -> Iterator[Purged]:
    used, total = usage
    used -= freed
    if used * 100 < settings.high_percent * total:
        return
    for blob in blobs:
        if used * 100 <= settings.low_percent * total:
            return
        if blob.replaceable:
            used -= blob.size_bytes
            yield blob.purged(f"file system {usage[0] * 100 // max(1, usage[1])} % full, least recently used")


def _remove(layout: Layout, digest: str) -> bool:
    """Remove a blob unless somebody took it, or is fetching it, since we looked."""
    fd = try_lock(layout.lock(digest))
    if fd is None:
        return False
    try:
        if use.user_of(layout, digest):
            return False
        layout.blob(digest).unlink(missing_ok=True)
        layout.fresh(digest).unlink(missing_ok=True)
        layout.lock(digest).unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def _stale_partials(layout: Layout, now: float, dry_run: bool) -> Iterator[Purged]:
    for path in sorted((layout.root / "partial").iterdir()):
        if path.suffix == ".seen" or now - path.stat().st_mtime < STALE_PARTIAL_S:
            continue
        fd = try_lock(layout.lock(path.name))
        if fd is None:
            continue
        yield Purged(f"sha256:{path.name}", (), _size(path), "a fetch that nobody went on with")
        if not dry_run:
            flight.discard(path)
            layout.lock(path.name).unlink(missing_ok=True)
        os.close(fd)


def _tidy(layout: Layout) -> None:
    """Settle what is written by now, and drop marks of what never came."""
    for mark in (layout.root / "fresh").iterdir():
        if layout.blob(mark.name).exists():
            settle.settle(layout, mark.name)
        elif not layout.partial(mark.name).exists() and time.time() - mark.stat().st_mtime > STALE_PARTIAL_S:
            mark.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes on the disk, which for a sparse file are fewer than its length."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
