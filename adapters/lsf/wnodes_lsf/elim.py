"""One report of elim.wnodes: what wnodesd's file says, in the words of LSF.

``python -I -m wnodes_lsf.elim RUN_DIR [IMAGE]…`` prints ``N name value [name value …]``: ``vmslots`` and for
each image that the site has declared ``img_NAME`` and ``tmpl_NAME``, 1 where the node has it. Reads a file of
root's and nothing of any user's; never asks wnodesd itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def report(text: str, images: Sequence[str], lives: Callable[[str, str], bool]) -> str:
    """The line for what ``RUN_DIR/capacity`` says; ``lives(pid, started)`` tells whether its wnodesd still runs.

    >>> report("wnodesd 7 99\\nslots 3\\nimage el9\\n", ["el9"], lambda pid, started: True)
    '3 vmslots 3 img_el9 1 tmpl_el9 0'
    >>> report("wnodesd 7 99\\nslots 3\\n", [], lambda pid, started: False)
    '1 vmslots 0'
    """
    words = [line.split() for line in text.splitlines()]
    alive = any(line[0] == "wnodesd" and len(line) == 3 and lives(line[1], line[2]) for line in words if line)
    slots = next((line[1] for line in words if line[:1] == ["slots"] and len(line) == 2 and line[1].isdecimal()), "0")
    pairs = [("vmslots", slots if alive else "0")]
    for name in images:
        pairs.append((f"img_{name}", str(int(alive and ["image", name] in words))))
        pairs.append((f"tmpl_{name}", str(int(alive and ["template", name] in words))))
    return f"{len(pairs)} " + " ".join(f"{name} {value}" for name, value in pairs)


def lives(pid: str, started: str) -> bool:
    """Whether the process with this pid and birth still runs."""
    try:
        words = Path(f"/proc/{int(pid)}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return False
    return words[19] == started and words[0] not in "ZX"


def main() -> int:
    """Print one report; without the file there is no capacity."""
    try:
        text = Path(sys.argv[1], "capacity").read_text(errors="replace")
    except OSError:
        text = ""
    print(report(text, sys.argv[2:], lives), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
