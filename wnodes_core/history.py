"""Leases that are over, with their traces, for ``wnodes lease``: bounded, and nothing depends on it."""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.files import read_tail

KEPT = 500
OF_USER = ".ended.jsonl"  # beside the leases of a user's embedded runs
_MAX_BYTES = 2 << 20
_FILE = "ended.jsonl"


def remember(path: Path, shown: dict[str, Any]) -> None:
    """Note a lease as it was last shown. A full disk loses only the memory of it. Blocks."""
    with suppress(OSError):
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            os.replace(path, path.with_suffix(".old"))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps(shown).encode() + b"\n")


def read(path: Path) -> deque[dict[str, Any]]:
    """The last leases that were remembered there, oldest first."""
    ended: deque[dict[str, Any]] = deque(maxlen=KEPT)
    for line in read_tail(path, _MAX_BYTES).splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "id" in found:
                ended.append({**found, "state": "ended"})
    return ended


class History:
    """The last leases that ended on this node. The file is root's, one JSON object a line."""

    def __init__(self, state_dir: str) -> None:
        self._path = Path(state_dir, _FILE)
        self._ended = read(self._path)

    def add(self, shown: dict[str, Any]) -> None:
        """Remember a lease as it was last shown. Blocks."""
        self._ended.append({**shown, "state": "ended"})
        remember(self._path, shown)

    def of(self, uid: int) -> list[dict[str, Any]]:
        """What a user may see of it, oldest first: their own leases, or all for root."""
        return [each for each in self._ended if uid in (0, each.get("uid"))]
