"""Bringing one blob into a store: one fetch for all who wait, whole or not at all, resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnodes_core.errors import DigestMismatch, FetchError, ImageError, StateDirFull, WnodesError, from_dict
from wnodes_core.files import full_disk_is_host_error, write_atomic
from wnodes_core.images.catalogue import Part
from wnodes_core.images.hashing import Follower, digest_of
from wnodes_core.images.layout import Layout, boot_id, locked

Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """A progress that nobody watches."""


@dataclass(frozen=True)
class Flight:
    """How blobs come into one store. ``hook`` is pluggy's relay to the image sources."""

    layout: Layout
    hook: Any

    def bring(
        self, part: Part, check: Callable[[Path], None], *, public: bool, progress: Progress, deadline: float
    ) -> None:
        """Have the blob in the store when this returns.

        However many processes and threads ask, one fetches and the others watch its progress;
        if it fails they fail with it, and do not queue up to fail again. ``check`` may refuse
        the file before it appears.

        Raises FetchError, DigestMismatch, ImageError, StateDirFull.
        """
        lock, began, waited = self.layout.lock(part.digest), time.time(), False

        def waiting() -> None:
            nonlocal waited
            waited = True
            progress(_size(self.layout.partial(part.digest)), int(_read(lock).get("total", 0)))

        with locked(lock, deadline=deadline, waiting=waiting) as fd:
            if self.layout.blob(part.digest).exists():
                return
            if waited:
                _fail_with_the_last(_read(lock), began)
            try:
                self._fetch(part, check, public, _telling(fd, progress), deadline)
            except WnodesError as error:
                _write(fd, {"failed": time.time(), "error": error.to_dict()})
                raise
            _write(fd, {})

    def _fetch(
        self, part: Part, check: Callable[[Path], None], public: bool, progress: Progress, deadline: float
    ) -> None:
        into = self.layout.partial(part.digest)
        self._mark_fresh(part.digest)
        problems: list[WnodesError] = []
        for source in part.sources:
            try:
                self._from_source(source, part.digest, into, progress, deadline)
                check(into)
                self.publish(into, part.digest, public=public)
                return
            except (FetchError, DigestMismatch) as error:
                problems.append(error)
            except (ImageError, StateDirFull):
                discard(into)  # a wrong file, or a disk that needs the room
                raise
        raise _verdict(part, problems)

    def _from_source(self, source: str, digest: str, into: Path, progress: Progress, deadline: float) -> None:
        """Fetch and compare; bytes kept from before may be to blame, so then once more from nothing."""
        resumed = _size(into) > 0
        found = self.fetch_one(source, into, progress, deadline)
        if found != digest and resumed:
            discard(into)
            found = self.fetch_one(source, into, progress, deadline)
        if found != digest:
            discard(into)
            raise DigestMismatch(f"{source}: the file is {found}, the catalogue wants {digest}")

    def fetch_one(self, source: str, into: Path, progress: Progress, deadline: float) -> str:
        """Fetch one source into a file; its digest. Raises FetchError, StateDirFull."""
        follower = Follower(into)

        def tell(done: int, total: int) -> None:
            follower.announce(done)
            progress(done, total)

        try:
            with full_disk_is_host_error(into.parent):
                if not self.hook.wnodes_image_fetch(source=source, into=into, deadline=deadline, progress=tell):
                    raise FetchError(f"{source}: no plug-in fetches that kind of source")
            return follower.finish() or digest_of(into)
        except OSError as error:
            raise FetchError(f"{source}: {error.strerror or error}") from error
        finally:
            follower.stop()

    def _mark_fresh(self, digest: str) -> None:
        # Synced now, while nothing is dirty: a sync after the fetch would wait for the whole image.
        write_atomic(self.layout.fresh(digest), boot_id().encode(), mode=0o600)

    def publish(self, into: Path, digest: str, *, public: bool) -> None:
        """Give a verified file its final name, at once and for good."""
        if not self.layout.fresh(digest).exists():
            self._mark_fresh(digest)
        os.chmod(into, 0o444 if public or os.geteuid() != 0 else 0o440)
        os.utime(into)
        os.rename(into, self.layout.blob(digest))
        discard(into)


def discard(into: Path) -> None:
    """Remove a partial file and the note beside it; absent is fine."""
    into.unlink(missing_ok=True)
    into.with_name(f"{into.name}.seen").unlink(missing_ok=True)


def _verdict(part: Part, problems: list[WnodesError]) -> WnodesError:
    """The one error for all sources: wrong bytes weigh more than no bytes."""
    if not part.sources:
        return FetchError(f"{part.digest}: not in the store, and the catalogue names no source")
    told = "; ".join(problem.message for problem in problems)
    if any(isinstance(problem, DigestMismatch) for problem in problems):
        return DigestMismatch(told, hint="correct the catalogue's sha256, or the source")
    return FetchError(f"none of {len(part.sources)} sources delivers: {told}" if len(problems) > 1 else told)


def _telling(fd: int, progress: Progress) -> Progress:
    """``progress`` that also leaves the size to come where the waiters look."""
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        if total != told:
            told = total
            _write(fd, {"total": total})
        progress(done, total)

    return tell


def _fail_with_the_last(state: dict[str, Any], began: float) -> None:
    if float(state.get("failed", 0)) >= began:
        raise from_dict(state["error"])


def _write(fd: int, state: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk; only waiters are the poorer
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(state).encode(), 0)


def _read(lock: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(lock.read_bytes()))
    return {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
