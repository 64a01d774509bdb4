"""Edits of slurm.conf as text: what a site has is kept, what we add can be taken out again to the byte.

A line that we must replace is kept as a comment that begins with ``KEPT``; ours stand in one block.
"""

from __future__ import annotations

import re

BEGIN = "# wnodes: begin (wnodes slurm install --uninstall takes this out)"
END = "# wnodes: end"
KEPT = "# wnodes kept: "


def value_of(text: str, key: str) -> str:
    """The value of ``Key=value``, or ''; Slurm's keys know no case, and the last line wins.

    >>> value_of("prologflags=Alloc  # x", "PrologFlags")
    'Alloc'
    """
    found = _values(text, key)
    return found[-1].strip() if found else ""


def count_of(text: str, key: str) -> int:
    """How many lines set the key."""
    return len(_values(text, key))


def _values(text: str, key: str) -> list[str]:
    return re.findall(rf"^[ \t]*{re.escape(key)}[ \t]*=[ \t]*([^#\n]*)", text, re.MULTILINE | re.IGNORECASE)


def without_ours(text: str) -> str:
    """The site's own text, as it was before ``with_ours``."""
    text = re.sub(rf"^{re.escape(BEGIN)}\n.*?^{re.escape(END)}\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(rf"^{re.escape(KEPT)}", "", text, flags=re.MULTILINE)


def with_ours(text: str, wanted: dict[str, str]) -> str:
    """The text with each wanted key set; running it twice changes nothing.

    >>> print(with_ours("Prolog=/x\\n", {"Prolog": "/y"}))
    # wnodes kept: Prolog=/x
    # wnodes: begin (wnodes slurm install --uninstall takes this out)
    Prolog=/y
    # wnodes: end
    <BLANKLINE>
    """
    text = without_ours(text)
    changed = {key: value for key, value in wanted.items() if value_of(text, key) != value}
    for key in changed:
        old = re.compile(rf"^(?=[ \t]*{re.escape(key)}[ \t]*=)", re.MULTILINE | re.IGNORECASE)
        text = old.sub(KEPT, text)
    if not changed:
        return text
    newline = "" if text.endswith("\n") or not text else "\n"
    block = "".join(f"{key}={value}\n" for key, value in changed.items())
    return f"{text}{newline}{BEGIN}\n{block}{END}\n"


def united(have: str, want: str) -> str:
    """A comma-separated list with every wanted word in it once, the site's first.

    >>> united("Alloc,X11", "Alloc,Contain")
    'Alloc,X11,Contain'
    """
    words = [word for word in have.split(",") if word]
    known = {word.lower() for word in words}
    return ",".join([*words, *(word for word in want.split(",") if word.lower() not in known)])
