"""The storage benchmark's table (Markdown) and plot (SVG), as they stand in docs/storage.md."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

BEGIN, END = "<!-- storage figures: begin -->", "<!-- storage figures: end -->"
PLOT = "storage.svg"
# What WNoDeS measured in 2011 on its worker nodes, sequential, MB/s: the lowest and the highest of its ways.
OF_2011 = (39.5, 112.0)
RATES = (("write", "MiB/s"), ("read", "MiB/s"))
COLUMNS = (
    *RATES,
    *((name, "/s") for name in ("random read", "random write", "create", "stat", "walk", "unlink")),
    *(("host CPU", "s/GiB"), ("guest CPU", "s/GiB")),
)
_COLOURS = ("#4878a8", "#e0a030")
_BAR, _GAP, _LEFT, _WIDTH = 12, 12, 150, 420

Results = dict[str, dict[str, list[float]]]


def document(results: Results, missing: dict[str, str], folder: Path, rounds: int) -> None:
    """Put both into ``folder``; the page has the two marks between which the table goes."""
    page = folder / "storage.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: want the lines {BEGIN} and {END}")
    where = f"{os.cpu_count()} shared CPUs, Linux {platform.release()}, guest under TCG, {rounds} rounds, medians"
    how = f"Measured with `benchmarks/run storage --update-docs`: {where}."
    text = f"{how}\n\n{table(results, missing)}\n\n![rates]({PLOT})"
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    (folder / PLOT).write_text(plot(results))


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(results: Results, missing: dict[str, str]) -> str:
    """One row a way, and the years before."""
    head = ["way", *(f"{name}, {unit}" for name, unit in COLUMNS)]
    rows = [head, ["---"] * len(head)]
    for way, found in results.items():
        rows.append([way, *(_shown(statistics.median(found[name])) for name, _ in COLUMNS)])
    rows += [[way, f"not measured: {why}", *[""] * (len(COLUMNS) - 1)] for way, why in missing.items()]
    old = "{:g}-{:g}".format(*OF_2011)
    rows.append(["WNoDeS in 2011 (MB/s, KVM)", old, old, *[""] * (len(COLUMNS) - 2)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: Results) -> str:
    """Bars of the two sequential rates; a band shows the range of 2011."""
    most = max([OF_2011[1], *(max(found[name]) for found in results.values() for name, _ in RATES)])

    def x(value: float) -> float:
        return _LEFT + value / most * _WIDTH

    band = x(OF_2011[1]) - x(OF_2011[0])
    height = 40 + len(results) * (2 * _BAR + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 70}" height="{height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect x="{x(OF_2011[0]):.1f}" y="24" width="{band:.1f}" height="{height - 24}" fill="#ddd"/>',
        f'<text x="{x(OF_2011[0]) + 4:.1f}" y="{height - 4}" fill="#666">2011</text>',
    ]
    for number, ((name, unit), colour) in enumerate(zip(RATES, _COLOURS, strict=True)):
        parts.append(f'<rect x="{_LEFT + number * 130}" y="4" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + number * 130 + 15}" y="13">{name}, {unit}</text>')
    for row, (way, found) in enumerate(results.items()):
        top = 28 + row * (2 * _BAR + _GAP)
        parts.append(f'<text x="{_LEFT - 6}" y="{top + _BAR + 4}" text-anchor="end">{way}</text>')
        for number, ((name, _), colour) in enumerate(zip(RATES, _COLOURS, strict=True)):
            value, y = statistics.median(found[name]), top + number * _BAR
            size = f'width="{x(value) - _LEFT:.1f}" height="{_BAR - 1}"'
            parts.append(f'<rect x="{_LEFT}" y="{y}" {size} fill="{colour}"/>')
            parts.append(f'<text x="{x(value) + 4:.1f}" y="{y + _BAR - 2}">{_shown(value)}</text>')
    return "\n".join([*parts, "</svg>\n"])
