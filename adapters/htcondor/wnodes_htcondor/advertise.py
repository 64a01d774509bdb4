"""One report of the startd's cron job: what wnodesd's file says, as attributes of the machine.

Reads a file of root's; never asks wnodesd, whose answer could keep the startd waiting.
"""

from __future__ import annotations

from pathlib import Path

from wnodes_core import tools
from wnodes_htcondor import native


def main(run_dir: str) -> int:
    """Print the attributes. A node whose wnodesd is gone has none, and says so: the startd keeps what it last heard."""
    try:
        text = Path(run_dir, "capacity").read_text(errors="replace")
    except OSError:
        text = ""
    print(native.advertised(text, alive(text)), end="", flush=True)
    return 0


def alive(text: str) -> bool:
    """Whether the wnodesd that wrote this still runs: it could not take its words back if it was killed."""
    words = text.partition("\n")[0].split()
    if len(words) != 3 or words[0] != "wnodesd" or not (words[1] + words[2]).isdecimal():
        return False
    process = tools.read(int(words[1]))
    return process is not None and process.started == int(words[2])
