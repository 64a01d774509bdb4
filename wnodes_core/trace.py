"""How long a lease's start took, phase by phase, and how its VM came up.

The keeper imports this on its way to the VM: standard library only, no I/O but the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FIRST = "first instruction"  # the phase that ends a start
KINDS = ("cold", "warm", "pool")
SHORT_S = 0.005  # the one line for a job leaves out what took less


class Step(NamedTuple):
    """One phase: ``begin`` is in seconds from LAUNCH called (negative: before it). Phases may overlap."""

    name: str
    begin: float
    seconds: float

    @property
    def end(self) -> float:
        """Seconds from LAUNCH called."""
        return self.begin + self.seconds


@dataclass(frozen=True)
class Start:
    """How a VM came up. ``kind``: ``cold`` (booted), ``warm`` (cloned for the job) or ``pool`` (cloned before it).

    ``way`` and ``template`` are the clone's; ``fallback`` is the kind of error that made a clone a boot.
    """

    kind: str = "cold"
    way: str = ""
    template: str = ""
    fallback: str = ""


@dataclass
class Trace:
    """The phases of one lease, in the order of their ends.

    ``origin`` is when LAUNCH was called, on the clock of ``time.monotonic()``: one for all processes
    of a machine (CLOCK_MONOTONIC), so launcher, keeper and wnodesd may each record their own part.
    """

    steps: list[Step] = field(default_factory=list)
    start: Start = field(default_factory=Start)
    origin: float = field(default_factory=time.monotonic)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Trace:
        """Go on with what another process of ours recorded; anew without it."""
        return cls([Step(*step) for step in data["steps"]], origin=float(data["origin"])) if data else cls()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; how the VM came up is not in it."""
        return {"origin": self.origin, "steps": [list(step) for step in self.steps]}

    def add(self, name: str, seconds: float) -> None:
        """Record that phase ``name``, which ends now, took ``seconds``."""
        begin = time.monotonic() - self.origin - seconds
        self.steps.append(Step(name, round(begin, 4), round(seconds, 4)))

    def catch_up(self, name: str) -> None:
        """Record as phase ``name`` all the time since the end of the phase before it."""
        done = max((step.end for step in self.steps), default=0.0)
        self.add(name, max(0.0, time.monotonic() - self.origin - done))

    def line(self) -> str:
        """The start in one line for the job.

        >>> Trace([Step("clone", 0.0, 0.06), Step("agent", 0.06, 0.001), Step(FIRST, 0.1, 0.05)], Start("warm")).line()
        'warm start in 0.150 s (clone 0.06, first instruction 0.05)'
        """
        parts = ", ".join(f"{name} {seconds:.2f}" for name, _, seconds in self.steps if seconds >= SHORT_S)
        return f"{heading(self.start, self.steps)} ({parts})"


def took(steps: Iterable[Step]) -> float:
    """Seconds from LAUNCH called to the user's first instruction, or to the end of what there is.

    >>> took([Step("boot", 0.5, 4.0), Step(FIRST, 4.5, 0.1), Step("run", 4.6, 60.0)])
    4.6
    """
    steps = list(steps)
    first = next((step.end for step in steps if step.name == FIRST), None)
    return max((0.0, *(step.end for step in steps))) if first is None else first


def heading(start: Start, steps: Iterable[Step]) -> str:
    """Kind and length of a start, and why it was no clone.

    >>> heading(Start("cold", fallback="BootTimeout"), [Step("boot", 0.0, 5.0)])
    'cold start, 5.000 s so far, no clone (BootTimeout)'
    """
    steps = list(steps)
    seconds = f"{took(steps):.3f} s"
    over = any(step.name == FIRST for step in steps)
    length = f" in {seconds}" if over else f", {seconds} so far"
    return f"{start.kind} start{length}" + (f", no clone ({start.fallback})" if start.fallback else "")
