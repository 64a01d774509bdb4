"""One measured figure, and how it is judged and printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; ``target`` as the project's own words; ``ok`` None = no target, or no value.

    ``value`` None = it could not be measured, and ``note`` says why.

    ``note`` says what it was measured beside, how often, and the physical limit where known.
    """

    name: str
    value: float | None
    unit: str
    target: str = ""
    ok: bool | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def seconds_of(action: Callable[[], object], runs: int) -> list[float]:
    """Wall seconds of each of ``runs`` calls."""
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return found


def in_turn(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Two actions A B A B …, so that a drifting machine hurts both alike."""
    a: list[float] = []
    b: list[float] = []
    for _ in range(runs):
        a += seconds_of(first, 1)
        b += seconds_of(second, 1)
    return a, b


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
