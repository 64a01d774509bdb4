"""The guest's serial console: what it said last, and how it is kept small."""

from __future__ import annotations

import os
import re

from wnodes_core.tools import read_tail

# Terminal sequences whole (CSI, OSC, two-byte), lest their letters remain as noise.
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?")
_QUOTED_LINES = 12
_QUOTED_BYTES = 8192
_LINE_LENGTH = 160


def boot_failure(console: str) -> str:
    """The end of the console, indented and safe for a terminal, for the message of a boot failure.

    >>> boot_failure("/nonexistent")
    'the console is empty'
    """
    text = read_tail(console, _QUOTED_BYTES) if console else ""
    lines = [_printable(_SEQUENCES.sub("", line))[:_LINE_LENGTH] for line in text.replace("\r\n", "\n").split("\n")]
    quoted = [line for line in lines if line][-_QUOTED_LINES:]
    if not quoted:
        return "the console is empty"
    return "the console ends with:\n" + "\n".join(f"  | {line}" for line in quoted)


def _printable(line: str) -> str:
    # A guest's words reach a user's terminal: no control or direction-changing character may.
    return "".join(char if char.isprintable() else " " for char in line).strip()


def bounded_console(path: str, limit_kib: int) -> bool:
    """Cut the console to its last half once it exceeds ``limit_kib``; True if it was cut.

    Safe while QEMU writes: it appends (``append='on'``), so it goes on at the new end. What it
    writes between our reading and our cutting is lost. Raises nothing: a missing file is fine.
    """
    limit = limit_kib << 10
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(fd, "r+b", buffering=0) as file:
        size = os.fstat(fd).st_size
        if size <= limit:
            return False
        kept = os.pread(fd, limit // 2, size - limit // 2)
        file.truncate(0)
        file.write(b"[... cut by wnodes ...]\n" + kept)
        return True
