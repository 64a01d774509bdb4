"""Changing a store's catalogue: add, tag, remove. Blobs first when adding, last when removing,
so that a crash in between leaves a blob without a name (which a purge removes), never a name
with nothing behind it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    arch: str = "x86_64",
    aliases: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    users: Sequence[str] = (),
    groups: Sequence[str] = (),
    progress: flight.Progress = flight.quiet,
    deadline: float | None = None,
) -> Entry:
    """Bring an image in from an absolute path or an URL and enter it as ``ref``.

    Without ``sha256`` the digest is that of what comes. ``format`` '' finds qcow2 out; raw must
    be said. An entry of the same name and tag is replaced.

    Raises SettingsError for a bad name or source, FetchError, DigestMismatch, BadFormat, StateDirFull.
    """
    wanted = ref.digest.removeprefix("sha256:") or sha256.lower()
    given: dict[str, Any] = {
        "name": ref.name,
        "tag": ref.tag or "latest",
        "arch": arch,
        "aliases": list(aliases),
        "facts": dict(facts or {}),
        "users": list(users),
        "groups": list(groups),
    }
    what = f"{ref.name}:{given['tag']}"
    expected = {**given, "sha256": wanted or "0" * 64, "format": format or "raw"}
    _check(store, expected, (source, *mirrors, kernel, initrd))
    until = time.monotonic() + 1800 if deadline is None else deadline
    public = not users and not groups
    store.layout.make()
    found = format

    def check(path: Path) -> None:
        nonlocal found
        found = format or formats.detect(path)
        formats.check(path, found)

    with naming(what):
        boot: dict[str, Any] = {"cmdline": cmdline} if kernel else {}
        for key, file in (("kernel", kernel), ("initrd", initrd)):
            if file:
                boot[key] = _bring_in(store, (file,), "", _any, public, progress, until).to_dict()
        disk = _bring_in(store, (source, *mirrors), wanted, check, public, progress, until)
        check(store.layout.blob(disk.digest))
    entry = Entry.from_dict({**given, **disk.to_dict(), "format": found, "boot": boot}, str(_file(store, ref.name)))
    _edit(store, ref.name, lambda entries: [e for e in entries if e.tag != entry.tag] + [entry])
    return entry


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
    public: bool,
    progress: flight.Progress,
    deadline: float,
) -> Part:
    if sha256:
        part = Part(f"sha256:{sha256}", tuple(sources))
        store.flight.bring(part, check, public=public, progress=progress, deadline=deadline)
        return part
    into = store.layout.partial(f"new-{os.urandom(8).hex()}")
    try:
        digest = store.flight.fetch_one(sources[0], into, progress, deadline)
        check(into)
        with locked(store.layout.lock(digest), deadline=deadline):
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
    _edit(store, new.name, lambda entries: [e for e in entries if e.tag != copy.tag] + [copy])
    return copy


def remove(store: Store, entry: Entry) -> list[purge.Purged]:
    """Take an entry away and then the blobs that nothing names or uses any more."""
    if Path(entry.origin).parent != store.layout.catalogue:
        raise SettingsError(f"image '{entry}': it is defined in {entry.origin}", hint="take it away there")
    _edit(store, entry.name, lambda entries: [e for e in entries if e.tag != entry.tag])
    return purge.orphans(store.layout, store.entries(), entry.digests)


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
