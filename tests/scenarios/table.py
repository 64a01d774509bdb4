"""docs/scenarios.md: the verdicts of the scenarios, batch system by batch system, as the suite saw them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scenarios import ALL

PAGE = Path(__file__).parents[2] / "docs" / "scenarios.md"
HEAD = """\
# Twenty scenarios

One suite, `tests/scenarios`, plays the same jobs in real VMs under every batch system. What each says of the job in its own
words stands below; the suite compares that with what it sees, and fails where they differ
(`WNODES_REGENERATE=1 scripts/test tests/scenarios` writes the page anew). LSF is a simulator of its protocol, all else is real.
Under HTCondor and LSF the VMs are clones, but for "cancel booting"; under the other two they are booted.

"""
TOOK = "Seconds, two emulated VMs at a time on two cores: "


@dataclass(frozen=True)
class Column:
    """One batch system: how it is called, a cell for each scenario, how long all took."""

    title: str
    cells: Mapping[str, str]
    seconds: str


def cell(verdict: str, reason: str) -> str:
    """What stands in the table: the native verdict, or why there can be none."""
    return f"cannot: {reason}" if reason else f"`{verdict or 'FAILED'}`"


def render(columns: list[Column]) -> str:
    """The page."""
    lines = [f"| scenario | what must be | {' | '.join(column.title for column in columns)} |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for name, scenario in ALL.items():
        cells = " | ".join(column.cells.get(name, "") for column in columns)
        lines.append(f"| {name} | {inspect.getdoc(scenario)} | {cells} |")
    took = ", ".join(f"{column.title} {column.seconds}" for column in columns)
    return HEAD + "\n".join(lines) + f"\n\n{TOOK}{took}.\n"


def parse(page: str) -> dict[str, Column]:
    """The columns of a page by their titles."""
    rows = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]
    if not rows:
        return {}
    took = page.partition(TOOK)[2]
    found = {}
    for number, title in enumerate(rows[0][2:], 2):
        seconds = re.search(re.escape(title) + r" (\d+)", took)
        cells = {row[0]: row[number].strip() for row in rows[1:]}
        found[title] = Column(title, cells, seconds[1] if seconds else "?")
    return found
