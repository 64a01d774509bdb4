"""Changing a store's catalogue: add, tag, remove. Blobs first when adding, last when removing,
so that a crash in between leaves a blob without a name (which a purge removes), never a name
with nothing behind it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnodes_core.errors import SettingsError
from wnodes_core.files import write_atomic
from wnodes_core.images import flight, formats, purge
from wnodes_core.images.catalogue import Entry, Part, read_file
from wnodes_core.images.layout import locked
from wnodes_core.images.naming import naming
from wnodes_core.model import ImageRef

if TYPE_CHECKING:
    from wnodes_core.images.store import Store

_LOCK_S = 30.0
_FETCH_S = 1800.0


def add(
    store: Store,
    source: str,
    ref: ImageRef,
    *,
    sha256: str = "",
    format: str = "",
    mirrors: Sequence[str] = (),
    kernel: str = "",
    initrd: str = "",
    cmdline: str = "",
    progress: flight.Progress = flight.quiet,
    deadline: float | None = None,
    **keys: Any,
) -> Entry:
    """Bring an image in from an absolute path or an URL and enter it as ``ref``.

    Without ``sha256`` the digest is that of what comes. ``format`` '' finds qcow2 out; raw must
    be said. ``keys`` are further keys of the catalogue: ``arch``, ``aliases``, ``facts``,
    ``users``, ``groups``. An entry of the same name and tag is replaced.

    Raises SettingsError for a bad name or source, FetchError, DigestMismatch, BadFormat, StateDirFull.
    """
    given: dict[str, Any] = {"name": ref.name, "tag": ref.tag or "latest", **keys}
    wanted = ref.digest.removeprefix("sha256:") or sha256.lower()
    expected = {**given, "sha256": wanted or "0" * 64, "format": format or "raw"}
    _check(store, expected, (source, *mirrors, kernel, initrd))
    bring = partial(
        _bring_in, store, public=not (keys.get("users") or keys.get("groups")), progress=progress, deadline=deadline
    )
    store.layout.make()
    with naming(f"{ref.name}:{given['tag']}"):
        if kernel:
            files = {"kernel": kernel, "initrd": initrd}
            given["boot"] = {key: bring((file,), "", _any).to_dict() for key, file in files.items() if file}
            given["boot"]["cmdline"] = cmdline
        disk = bring((source, *mirrors), wanted, lambda path: formats.check(path, format or formats.detect(path)))
        given["format"] = format or formats.detect(store.layout.blob(disk.digest))
        formats.check(store.layout.blob(disk.digest), given["format"])  # it may have been here before
    return _enter(store, Entry.from_dict({**given, **disk.to_dict()}, str(_file(store, ref.name))))


def _any(path: Path) -> None:
    """A kernel or an initrd: nothing to check but the digest."""


def _check(store: Store, data: dict[str, Any], sources: Sequence[str]) -> None:
    """See that the entry will be one before anything is fetched for it."""
    entry = Entry.from_dict({**data, "sources": [source for source in sources if source]}, "image add")
    for other in store.entries():
        if str(other) == str(entry) and Path(other.origin).parent != store.layout.catalogue:
            raise SettingsError(f"image '{entry}': it is defined in {other.origin}", hint="change it there")


def _bring_in(
    store: Store,
    sources: Sequence[str],
    sha256: str,
    check: Callable[[Path], None],
    *,
    public: bool,
    progress: flight.Progress,
    deadline: float | None,
) -> Part:
    until = time.monotonic() + _FETCH_S if deadline is None else deadline
    if sha256:
        part = Part(f"sha256:{sha256}", tuple(sources))
        store.flight.bring(part, check, public=public, progress=progress, deadline=until)
        return part
    into = store.layout.partial(f"new-{os.urandom(8).hex()}")
    try:
        digest = store.flight.fetch_one(sources[0], into, progress, until)
        check(into)
        with locked(store.layout.lock(digest), deadline=until):
            if not store.layout.blob(digest).exists():
                store.flight.publish(into, digest, public=public)
    finally:
        flight.discard(into)
    return Part(digest, tuple(sources))


def tag(store: Store, entry: Entry, new: ImageRef) -> Entry:
    """Enter an image under a further name or tag; whoever had that one loses it."""
    store.layout.make()
    copy = replace(entry, name=new.name, tag=new.tag or "latest", aliases=(), origin=str(_file(store, new.name)))
    _check(store, copy.to_dict(), ())
    return _enter(store, copy)


def remove(store: Store, entry: Entry) -> list[purge.Purged]:
    """Take an entry away and then the blobs that nothing names or uses any more."""
    if Path(entry.origin).parent != store.layout.catalogue:
        raise SettingsError(f"image '{entry}': it is defined in {entry.origin}", hint="take it away there")
    _edit(store, entry.name, lambda entries: [e for e in entries if e.tag != entry.tag])
    return purge.orphans(store.layout, store.entries(), entry.digests)


def _enter(store: Store, entry: Entry) -> Entry:
    _edit(store, entry.name, lambda entries: [e for e in entries if e.tag != entry.tag] + [entry])
    return entry


def _file(store: Store, name: str) -> Path:
    return store.layout.catalogue / f"{name}.json"


def _edit(store: Store, name: str, change: Callable[[list[Entry]], list[Entry]]) -> None:
    path = _file(store, name)
    with locked(store.layout.lock("catalogue"), deadline=time.monotonic() + _LOCK_S):
        entries = change(read_file(path) if path.exists() else [])
        if entries:
            text = json.dumps({"images": [entry.to_dict() for entry in entries]}, indent=1)
            write_atomic(path, text.encode() + b"\n")
        else:
            path.unlink(missing_ok=True)
