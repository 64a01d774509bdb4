"""Printing a lease's serial console: written by a guest that nobody trusts, kept in a user's folder.

So no link is followed, only the lease owner's own regular file is read, and control characters
are shown instead of obeyed. The keeper cuts the file to nothing when it grows too large.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from wnodes_core.cli.output import clean
from wnodes_core.errors import RequestError

_BLOCK = 1 << 16
_POLL_S = 0.2  # inotify is not in the standard library; a console is for people
# Colours, cursor moves and window titles that firmware and systemd print: noise, not text (ECMA-48).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[ -/]*[0-~])")


def show(folder: str, uid: int, *, lines: int | None = None, follow: bool = False) -> int:
    """Print ``FOLDER/console.log`` (the last ``lines`` of it), with ``follow`` until the lease is gone.

    Raises RequestError if there is none that belongs to ``uid``.
    """
    path = Path(folder, "console.log")
    fd = _open(path, uid)
    with os.fdopen(fd, "rb", buffering=0) as file:
        for text in _texts(file.fileno(), path, lines, follow):
            sys.stdout.write(text)
            sys.stdout.flush()
    return 0


def _open(path: Path, uid: int) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RequestError(
            f"{path}: no console yet", hint="the VM has not been started, or its lease is over"
        ) from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (uid, 0):
        os.close(fd)
        raise RequestError(
            f"{path}: want a file of uid {uid}, found uid {found.st_uid}, {stat.filemode(found.st_mode)}"
        )
    return fd


def _texts(fd: int, path: Path, lines: int | None, follow: bool) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    at = _last_lines(fd, lines) if lines is not None else 0
    rest = ""
    while True:
        data = os.pread(fd, _BLOCK, at)
        if data:
            at += len(data)
            whole, rest = _whole_lines(rest + decoder.decode(data))
            yield printable(whole)
            continue
        gone = not follow or not path.exists()
        if rest and (gone or "\x1b" not in _ESCAPES.sub("", rest)):  # a prompt, and no half of an escape in it
            yield printable(rest)
            rest = ""
        if gone:
            return
        time.sleep(_POLL_S)
        if os.fstat(fd).st_size < at:
            at = 0
            yield "\n[wnodes: the console was cut at its limit]\n"


def _whole_lines(text: str) -> tuple[str, str]:
    head, newline, tail = text.rpartition("\n")
    return head + newline, tail


def _last_lines(fd: int, lines: int) -> int:
    """Where the last ``lines`` lines begin."""
    end = at = os.fstat(fd).st_size
    tail = b""
    while at > 0 and tail.rstrip(b"\n").count(b"\n") < lines:
        begin = max(0, at - _BLOCK)
        tail = os.pread(fd, at - begin, begin) + tail
        at = begin
    kept = tail.splitlines(keepends=True)[-lines:] if lines else []
    return end - sum(map(len, kept))


def printable(text: str) -> str:
    r"""Console text for a terminal: line ends tidied, escape sequences dropped, the rest shown.

    >>> printable("\x1b[2J\x1b[01;32m ok\x1b[0m\r\nbell\x07\n")
    ' ok\nbell\\x07\n'
    """
    return clean(_ESCAPES.sub("", text).replace("\r", ""), keep="\n\t")
