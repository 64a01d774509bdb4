"""What commands print: tables, JSON, sizes and ages for people, colour where it is wanted."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
_AGES = ((604800, "w"), (86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def clean(text: object, *, keep: str = "") -> str:
    r"""Text of others as it may go to a terminal: control characters become visible.

    >>> clean("a\x1b[31m\u202eb"), clean("tab\t", keep="\t")
    ('a\\x1b[31m\\u202eb', 'tab\t')
    """
    return "".join(
        c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else _visible(c)
        for c in str(text)
    )


def _visible(character: str) -> str:
    return character.encode("unicode_escape").decode()


def use_colour(stream: TextIO) -> bool:
    """Whether to colour this stream: a terminal, and NO_COLOR (no-color.org) not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour, if ``stream`` (default stdout) takes any."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if use_colour(stream or sys.stdout) else text


def print_json(value: Any) -> None:
    """One JSON document on stdout, safe in any encoding."""
    print(json.dumps(value, indent=2, sort_keys=False))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> str:
    """Aligned columns two blanks apart; ``right`` are the numbers of right-aligned columns.

    >>> print(table(["NAME", "SIZE"], [["el9", "1.0 GiB"], ["debian12", "391 MiB"]], right=[1]))
    NAME         SIZE
    el9       1.0 GiB
    debian12  391 MiB
    """
    lines = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(header))]
    right = set(right)

    def pad(i: int, cell: str) -> str:
        blanks = " " * (widths[i] - width(cell))
        return blanks + cell if i in right else cell + blanks

    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """A table on stdout; its header bold on a terminal."""
    head, *rest = table(header, rows, right=right).split("\n")
    print("\n".join([paint(head, "bold"), *rest]))


def width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def size(count: float) -> str:
    """Bytes for people, in binary units.

    >>> size(512), size(8 << 30), size(1_500_000)
    ('512 B', '8.0 GiB', '1.4 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def age(seconds: float) -> str:
    """A span of time for people, its two largest units.

    >>> age(3), age(75), age(90000), age(-1)
    ('3s', '1m15s', '1d1h', '0s')
    """
    left = max(0, int(seconds))
    parts: list[str] = []
    for span, name in _AGES:
        number, left = divmod(left, span)
        if number or parts:
            parts.append(f"{number}{name}" if number else "")
        if len(parts) == 2:
            break
    return "".join(parts) or "0s"


def confirm(question: str) -> bool | None:
    """The answer of whoever sits at the terminal; None if nobody does."""
    if not sys.stdin.isatty():
        return None
    print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
