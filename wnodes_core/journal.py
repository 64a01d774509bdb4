"""The lease journal: intent before effect, append-only, fsynced, replayed after a crash.

One file a lease, one JSON object a line::

    {"op": "making", "kind": "disk", "name": "/…/overlay.qcow2", "data": {…}, "at": 1700000000.0}
    {"op": "made", "kind": "disk", "name": …, "data": {…}}
    {"op": "gone", "kind": "disk", "name": …}

A resource is *open* from ``making`` until ``gone``. Whoever finds the journal of a dead lease
undoes its open resources newest first; every undo accepts "already gone". A last line cut
short by a crash is ignored: its effect had not begun, because the line is synced first.
A journal is undone with the rights of the user who wrote it, never with more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wnodes_core.files import full_disk_is_host_error, sync_folder, write_atomic

MAX_BYTES = 4 << 20  # far above any real lease; a larger file is not ours
# A user can have the same facts of one lease noted again and again: past this the file is written
# anew with what is still open, so that it never grows beyond what ``read`` looks at.
COMPACT_BYTES = 1 << 20


@dataclass(frozen=True)
class Resource:
    """One thing that a lease made, or was about to make."""

    kind: str
    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """An open journal file. ``Journal(path)`` creates it or goes on with what is there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open = {(r.kind, r.name): r for r in read(self.path)}
        created = not self.path.exists()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size
        if created:
            sync_folder(self.path.parent)

    def _append(self, op: str, resource: Resource) -> None:
        line = _line(op, resource)
        if self._size + len(line) > COMPACT_BYTES:
            self._compact()
        with full_disk_is_host_error(self.path.parent):
            os.write(self._fd, line)
            os.fdatasync(self._fd)
        self._size += len(line)

    def _compact(self) -> None:
        """Write the file anew with the open resources only: whole or not at all, as any file of ours."""
        lines = b"".join(_line("made", resource) for resource in self._open.values())
        write_atomic(self.path, lines, mode=0o600)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._size = len(lines)

    def making(self, kind: str, name: str, /, **data: Any) -> Resource:
        """Record the intent; call it before the effect. Raises StateDirFull."""
        resource = Resource(kind, name, data)
        self._append("making", resource)
        self._open[kind, name] = resource
        return resource

    def made(self, resource: Resource, /, **data: Any) -> Resource:
        """Record that it exists, with facts that only now are known (a pid, a device)."""
        resource = Resource(resource.kind, resource.name, {**resource.data, **data})
        self._append("made", resource)
        self._open[resource.kind, resource.name] = resource
        return resource

    def gone(self, resource: Resource) -> None:
        """Record that it no longer exists."""
        self._append("gone", resource)
        self._open.pop((resource.kind, resource.name), None)

    @contextmanager
    def making_it(self, kind: str, name: str, /, **data: Any) -> Iterator[dict[str, Any]]:
        """Intent, then the body's effect, then ``made`` with what the body put into the dict."""
        resource = self.making(kind, name, **data)
        facts: dict[str, Any] = {}
        yield facts
        self.made(resource, **facts)

    @property
    def open_resources(self) -> list[Resource]:
        """What is to be undone, newest first."""
        return list(reversed(self._open.values()))

    def undo(self, undo_one: Callable[[Resource], None]) -> list[Exception]:
        """Undo every open resource, newest first; go on after a failure, return all of them."""
        errors: list[Exception] = []
        for resource in self.open_resources:
            try:
                undo_one(resource)
                self.gone(resource)
            except Exception as error:  # noqa: BLE001 - teardown never stops half-way (wall 4)
                error.add_note(f"while undoing {resource.kind} {resource.name}")
                errors.append(error)
        return errors

    def close(self) -> None:
        """Let go of the file; the journal itself stays."""
        os.close(self._fd)


def read(path: str | Path) -> list[Resource]:
    """The open resources of a journal, oldest first. Unreadable lines are skipped."""
    opened: dict[tuple[str, str], Resource] = {}
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hang us
    except FileNotFoundError:
        return []
    with os.fdopen(fd, "rb") as file:
        for line in file.read(MAX_BYTES).splitlines():
            entry = _entry(line)
            if entry is None:
                continue
            op, resource = entry
            key = (resource.kind, resource.name)
            if op == "gone":
                opened.pop(key, None)
            else:
                opened[key] = resource
    return list(opened.values())


def _line(op: str, resource: Resource) -> bytes:
    # The newline stands first: a torn last line of a crash is closed off by it.
    what = {"kind": resource.kind, "name": resource.name, "data": dict(resource.data)}
    return b"\n" + json.dumps({"op": op, **what, "at": time.time()}).encode()


def _entry(line: bytes) -> tuple[str, Resource] | None:
    try:
        data = json.loads(line)
        return str(data["op"]), Resource(str(data["kind"]), str(data["name"]), dict(data["data"]))
    except (ValueError, KeyError, TypeError):
        return None
