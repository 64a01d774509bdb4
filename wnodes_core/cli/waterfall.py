"""The waterfall of a lease's start: a bar a phase, for ``wnodes lease trace`` and ``wnodes run --trace``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wnodes_core.cli import output
from wnodes_core.trace import Start, Step, heading, took

_WIDEST = 120
_NARROWEST_BAR = 10


def steps_of(trace: object) -> list[Step]:
    """The phases in a lease's JSON, in the order in which they began; what is none is left out."""
    found = []
    for item in trace if isinstance(trace, list) else []:
        if isinstance(item, list) and len(item) == 3 and all(isinstance(part, int | float) for part in item[1:]):
            found.append(Step(str(item[0]), float(item[1]), float(item[2])))
    return sorted(found, key=lambda step: step.begin)


def start_of(start: object) -> Start:
    """How the VM came up, in a lease's JSON."""
    given = start if isinstance(start, dict) else {}
    return Start(**{name: output.clean(word) for name, word in given.items() if name in Start.__dataclass_fields__})


def draw(steps: Sequence[Step], start: Start, columns: int) -> str:
    """A line that says how the VM came up, then one a phase: when it began, how long it took, its bar.

    The bars' axis is the start, from LAUNCH called to the user's first instruction. What was before it
    or comes after it is cut off at that side (``<``, ``>``).

    >>> steps = [Step("admit", -0.5, 0.2), Step("boot", 0, 3.0), Step("first instruction", 3, 1), Step("run", 4, 9)]
    >>> print(draw(steps, Start(), 58))
    cold start in 4.000 s
    phase                  at  seconds
    admit              -0.500    0.200  |<                   |
    boot                0.000    3.000  |###############     |
    first instruction   3.000    1.000  |               #####|
    run                 4.000    9.000  |                   >|
    """
    rows = [("phase", "at", "seconds")]
    rows += [(output.clean(step.name), f"{step.begin:.3f}", f"{step.seconds:.3f}") for step in steps]
    table = output.table(rows[0], rows[1:], right=(1, 2)).split("\n")
    total, room = took(steps), max(_NARROWEST_BAR, min(columns, _WIDEST) - output.width(table[0]) - 4)
    bars = ["", *(f"  |{_bar(step, total, room):<{room}}|" for step in steps)]
    return "\n".join([title(start, steps), *(line + bar for line, bar in zip(table, bars, strict=True))])


def title(start: Start, steps: Iterable[Step]) -> str:
    """How the VM came up and how long that took, with way and template of a clone."""
    how = [word for word in (start.way, start.template and f"template {start.template}") if word]
    return heading(start, steps) + (f" ({', '.join(how)})" if how else "")


def _bar(step: Step, total: float, room: int) -> str:
    """The part of the axis from 0 to ``total`` that a phase takes; ``.`` for less than a sign's worth."""
    scale = room / total if total > 0 else 0.0
    begin = min(room - 1, max(0, round(scale * step.begin)))
    end = min(room, max(begin + 1, round(scale * step.end)))
    sign = "#" if scale * step.seconds >= 0.5 else "."
    bar = [" "] * begin + [sign] * (end - begin)
    if step.begin < 0:
        bar[0] = "<"
    if step.end > total + 0.0005:
        bar[-1] = ">"
    return "".join(bar)
