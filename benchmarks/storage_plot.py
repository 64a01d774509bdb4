"""The storage benchmark's table (Markdown) and plots (SVG), as they stand in docs/storage.md."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

BEGIN, END = "<!-- storage figures: begin -->", "<!-- storage figures: end -->"
PLOT, CURVE = "storage.svg", "storage-clients.svg"
# What WNoDeS measured in 2011 on its worker nodes, sequential, MB/s: the lowest and the highest of its ways.
OF_2011 = (39.5, 112.0)
RATES = (("write", "MiB/s"), ("read", "MiB/s"))
COLUMNS = (
    *RATES,
    *((name, "/s") for name in ("random read", "random write", "create", "stat", "walk", "unlink")),
    ("git status", "files/s"),
    ("host CPU", "s/GiB"),
    *((f"{name} cpu", "s/GiB") for name, _ in RATES),
    ("files", "most"),
)
_HEADS = {"write cpu": "guest CPU write", "read cpu": "guest CPU read"}
_COLOURS = ("#4878a8", "#e0a030")
_DASHES = {"whole": "", "dashed": ' stroke-dasharray="6 4"', "dotted": ' stroke-dasharray="2 3"'}
_BAR, _GAP, _LEFT, _WIDTH = 12, 12, 150, 420

Results = dict[str, dict[str, list[float]]]
Curves = dict[str, list[tuple[int, float, float]]]  # (clients, written, read) of each way


def document(results: Results, missing: dict[str, str], curves: Curves, folder: Path, rounds: int) -> None:
    """Put all into ``folder``; the page has the two marks between which the table goes."""
    page = folder / "storage.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: want the lines {BEGIN} and {END}")
    where = f"{os.cpu_count()} shared CPUs, Linux {platform.release()}, guest under TCG, {rounds} rounds, medians"
    how = f"Measured with `benchmarks/run storage --update-docs`: {where}."
    clients = f"{clients_table(curves)}\n\n![clients]({CURVE})\n" if curves else ""
    text = f"{how}\n\n{table(results, missing)}\n\n![rates]({PLOT})\n\n{clients}"
    page.write_text(f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}")
    (folder / PLOT).write_text(plot(results))
    if curves:
        (folder / CURVE).write_text(plot_clients(curves))


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _cell(found: dict[str, list[float]], name: str) -> str:
    if name not in found:
        return ""
    return _shown(max(found[name]) if name == "files" else statistics.median(found[name]))


def _rows(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table(results: Results, missing: dict[str, str]) -> str:
    """One row a way, and the years before."""
    rows = [["way", *(f"{_HEADS.get(name, name)}, {unit}" for name, unit in COLUMNS)]]
    for way, found in results.items():
        rows.append([way, *(_cell(found, name) for name, _ in COLUMNS)])
    rows += [[way, f"not measured: {why}", *[""] * (len(COLUMNS) - 1)] for way, why in missing.items()]
    old = "{:g}-{:g}".format(*OF_2011)
    rows.append(["WNoDeS in 2011 (MB/s, KVM)", old, old, *[""] * (len(COLUMNS) - 2)])
    return _rows(rows)


def clients_table(curves: Curves) -> str:
    """One column a number of clients."""
    rows = [["clients", *(str(clients) for clients, _, _ in next(iter(curves.values())))]]
    for way, curve in curves.items():
        for number, (name, _) in enumerate(RATES, 1):
            rows.append([f"{way}, {name}, MiB/s in all", *(_shown(each[number]) for each in curve)])
    return _rows(rows)


def _svg(width: float, height: float) -> str:
    size = f'width="{width:g}" height="{height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'


def _legend(left: int) -> list[str]:
    parts = []
    for number, ((name, unit), colour) in enumerate(zip(RATES, _COLOURS, strict=True)):
        parts.append(f'<rect x="{left + number * 130}" y="4" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + number * 130 + 15}" y="13">{name}, {unit}</text>')
    return parts


def plot(results: Results) -> str:
    """Bars of the two sequential rates; a band shows the range of 2011."""
    most = max([OF_2011[1], *(max(found[name]) for found in results.values() for name, _ in RATES)])

    def x(value: float) -> float:
        return _LEFT + value / most * _WIDTH

    band = x(OF_2011[1]) - x(OF_2011[0])
    height = 40 + len(results) * (2 * _BAR + _GAP)
    parts = [
        _svg(_LEFT + _WIDTH + 70, height),
        f'<rect x="{x(OF_2011[0]):.1f}" y="24" width="{band:.1f}" height="{height - 24}" fill="#ddd"/>',
        f'<text x="{x(OF_2011[0]) + 4:.1f}" y="{height - 4}" fill="#666">2011</text>',
        *_legend(_LEFT),
    ]
    for row, (way, found) in enumerate(results.items()):
        top = 28 + row * (2 * _BAR + _GAP)
        parts.append(f'<text x="{_LEFT - 6}" y="{top + _BAR + 4}" text-anchor="end">{way}</text>')
        for number, ((name, _), colour) in enumerate(zip(RATES, _COLOURS, strict=True)):
            value, y = statistics.median(found[name]), top + number * _BAR
            size = f'width="{x(value) - _LEFT:.1f}" height="{_BAR - 1}"'
            parts.append(f'<rect x="{_LEFT}" y="{y}" {size} fill="{colour}"/>')
            parts.append(f'<text x="{x(value) + 4:.1f}" y="{y + _BAR - 2}">{_shown(value)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def plot_clients(curves: Curves) -> str:
    """The throughput of all clients together over their number, each doubling as far as the one before."""
    first = next(iter(curves.values()))
    left, wide, high, step = 50, 420, 160, 420 / max(1, len(first) - 1)
    most = max(rate for curve in curves.values() for each in curve for rate in each[1:])
    parts = [_svg(left + wide + 40, high + 70), *_legend(left)]
    bottom = 30 + high
    parts.append(f'<path d="M{left} 30V{bottom}H{left + wide}" fill="none" stroke="#888"/>')
    parts.append(f'<text x="{left - 6}" y="36" text-anchor="end">{_shown(most)}</text>')
    for number, each in enumerate(first):
        parts.append(f'<text x="{left + number * step:.1f}" y="{bottom + 16}" text-anchor="middle">{each[0]}</text>')
    drawn = ", ".join(f"{way} {dash}" for way, dash in zip(curves, _DASHES, strict=False))
    parts.append(f'<text x="{left + wide / 2:g}" y="{bottom + 32}" text-anchor="middle">clients ({drawn})</text>')
    for curve, dash in zip(curves.values(), _DASHES.values(), strict=False):
        for number, colour in enumerate(_COLOURS, 1):
            heights = (bottom - each[number] / most * high for each in curve)
            points = [f"{left + n * step:.1f},{y:.1f}" for n, y in enumerate(heights)]
            line = f'fill="none" stroke="{colour}" stroke-width="2"{dash}'
            parts.append(f'<polyline points="{" ".join(points)}" {line}/>')
    return "\n".join([*parts, "</svg>\n"])
