"""Every way to a folder of the host, side by side in one guest: rates, CPU, and their ratios to virtiofs.

``benchmarks/run storage --update-docs`` writes table and plot into docs/. Ratios are medians of
rounds in which each way had its turn, so that a machine that others use hurts all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import storage_ways
from figure import Figure
from storage_plot import document

__all__ = ["document", "measure", "update_docs"]

ROUNDS, MIB, FILES = 3, 64, 100
LOAD = Path(__file__).with_name("storage_load.py").read_text()
BASE = "virtiofs"
LARGE, SMALL = ("write", "read"), ("random read", "random write", "create", "stat", "walk", "unlink")
Results = dict[str, dict[str, list[float]]]
_last: tuple[Results, dict[str, str]] = ({}, {})


def measure() -> list[Figure]:
    """All ways in turn, then the goals as ratios."""
    global _last
    _last = results, missing = run()
    return [*_goals(results, missing), *(Figure(way, None, "", note=why) for way, why in missing.items())]


def update_docs(folder: Path) -> None:
    """Write the table and the plot of the last measurement."""
    document(*_last, folder, ROUNDS)


def run() -> tuple[Results, dict[str, str]]:
    """(way -> what -> values, way -> why it could not be had)."""
    results: Results = {}
    missing: dict[str, str] = {}
    with storage_ways.guest() as guest:
        try:
            pids = _mounted(guest, missing)
            for number in range(ROUNDS):
                for way in pids:
                    print(f"benchmarks: storage: round {number + 1}, {way}", file=sys.stderr, flush=True)
                    for what, value in _one(guest, way, pids[way]).items():
                        results.setdefault(way, {}).setdefault(what, []).append(value)
        finally:
            storage_ways.end_helpers(guest)
    return results, missing


def _mounted(guest: Any, missing: dict[str, str]) -> dict[str, list[int]]:
    pids = {}
    for number, (way, mount) in enumerate(storage_ways.WAYS.items()):
        try:
            pids[way] = mount(guest, _target(number))
        except (storage_ways.Unavailable, OSError) as error:
            missing[way] = str(error)
    return pids


def _target(number: int) -> str:
    return f"/bench/{number}"


def _one(guest: Any, way: str, gateway: list[int]) -> dict[str, float]:
    target = _target(list(storage_ways.WAYS).index(way))
    found: dict[str, float] = {}
    for part in ("large", "small"):
        before = storage_ways.cpu_seconds([guest.process.pid, *gateway])
        said = storage_ways.must(
            guest, ["python3", "-I", "-c", LOAD, part, target, str(MIB), str(FILES)], timeout_s=600
        )
        spent = storage_ways.cpu_seconds([guest.process.pid, *gateway]) - before
        found |= json.loads(said)
        if part == "large":
            gib = 2 * MIB / 1024
            found["host CPU"] = spent / gib
            found["guest CPU"] = (found["write cpu"] + found["read cpu"]) / gib
    return found


def ratio(results: Results, way: str, what: str, base: str = BASE) -> float | None:
    """Median over the rounds of one way's rate by the base's, None if either is missing."""
    if way not in results or base not in results:
        return None
    return statistics.median(a / b for a, b in zip(results[way][what], results[base][what], strict=True))


def _goals(results: Results, missing: dict[str, str]) -> list[Figure]:
    load = f"{ROUNDS} rounds in turn, load {os.getloadavg()[0]:.1f}"
    goals = [
        ("sshfs, channel", BASE, LARGE, 0.8),
        ("NFS 4.1 (ganesha)", BASE, LARGE, 0.8),
        ("sshfs, channel", BASE, ("create", "stat", "unlink"), 0.5),
        ("sshfs, channel", "sshfs, encrypted", (*LARGE, *SMALL), 1.0),
        ("scratch disk", "overlay disk", LARGE, 0.9),
    ]
    figures = []
    for way, base, columns, want in goals:
        for what in columns:
            value = ratio(results, way, what, base)
            ok = None if value is None else value >= want
            why = missing.get(way) or missing.get(base) or load
            figures.append(Figure(f"{way} against {base}: {what}", value, "×", f"≥ {want:g}", ok, why))
    return figures
