"""The trace of a start: exact, begun at LAUNCH, in one line or as a waterfall."""

from __future__ import annotations

import doctest
import json
import time

import pytest

from wnodes_core import trace
from wnodes_core.cli import waterfall
from wnodes_core.trace import FIRST, Start, Step, Trace, heading, took


def test_doctests() -> None:
    assert doctest.testmod(trace).failed == doctest.testmod(waterfall).failed == 0


def test_phases_may_overlap_and_begin_where_they_did() -> None:
    made = Trace(origin=time.monotonic() - 10)
    made.add("long", 4)
    made.add("short", 1)
    assert [(step.name, step.seconds) for step in made.steps] == [("long", 4), ("short", 1)]
    assert made.steps[0].begin == pytest.approx(6, abs=0.02) and made.steps[1].begin == pytest.approx(9, abs=0.02)
    assert made.steps[0].end == pytest.approx(made.steps[1].end, abs=0.02)


def test_another_process_goes_on_with_a_trace() -> None:
    mine = Trace(origin=time.monotonic() - 2)
    mine.add("launcher", 1.5)
    theirs = Trace.from_dict(json.loads(json.dumps(mine.to_dict())))
    assert (theirs.origin, theirs.steps) == (mine.origin, mine.steps)
    theirs.catch_up("keeper")
    assert theirs.steps[1].begin == pytest.approx(theirs.steps[0].end, abs=0.0002)
    assert Trace.from_dict(None).steps == []


def test_what_is_caught_up_begins_with_the_trace_and_is_never_negative() -> None:
    made = Trace(origin=time.monotonic() - 3)
    made.catch_up("launcher")
    assert made.steps[0].begin == pytest.approx(0, abs=0.0002) and 3 <= made.steps[0].seconds < 60
    made.steps.append(Step("of a clock ahead", 0, 9))
    made.catch_up("late")
    assert made.steps[-1].seconds == 0


def test_the_line_leaves_out_what_is_too_short_to_see() -> None:
    made = Trace([Step("clone", 0, 0.2), Step("agent", 0.2, 0.004), Step(FIRST, 0.25, 0.05)], Start("pool"))
    assert made.line() == "pool start in 0.300 s (clone 0.20, first instruction 0.05)"
    made.start = Start("cold", fallback="IdentityError")
    assert made.line().startswith("cold start in 0.300 s, no clone (IdentityError) (clone")


def test_a_start_that_is_not_over_says_so() -> None:
    assert (took([]), took([Step("boot", -3, 1)])) == (0.0, 0.0)
    assert heading(Start("warm"), [Step("clone", 0, 0.5)]) == "warm start, 0.500 s so far"


SHAPES = [
    [],
    [Step("a", 0, 0)],
    [Step("a", 0, 0), Step("b", 0, 1e-9)],
    [Step("long" * 30, 0, 3), Step("x", 3, 0)],
    [Step("before", -1e6, 1), Step("across", -1, 2), Step(FIRST, 1, 1), Step("run", 2, 1e6), Step("teardown", 1e6, 0)],
    [Step("wide \u4e16\x1b[31m", 0, 1), Step(FIRST, 1, 1e-6)],
]


@pytest.mark.parametrize("steps", SHAPES)
@pytest.mark.parametrize("columns", [1, 80, 4000])
def test_waterfalls_of_any_shape(steps: list[Step], columns: int) -> None:
    from wnodes_core.cli.output import width

    title, head, *lines = waterfall.draw(steps, Start(), columns).splitlines()
    assert title.startswith("cold start") and head.startswith("phase")
    assert len(lines) == len(steps) and "\x1b" not in "".join(lines)
    assert len({width(line) for line in lines}) <= 1
    assert all(set(line[line.index("|") + 1 : -1]) & set("#.<>") for line in lines), "a bar each"


def test_a_bar_that_leaves_the_axis_is_cut_at_that_side() -> None:
    drawn = waterfall.draw(SHAPES[4], Start(), 200)
    bars = [line.partition("|")[2][:-1].strip() for line in drawn.splitlines()[2:]]
    assert bars[0] == "<" and bars[1][0] == "<" and set(bars[1][1:]) == {"#"}
    assert set(bars[2]) == {"#"} and bars[3] == bars[4] == ">"


@pytest.mark.parametrize("raw", [None, 7, "x", [1], [[]], [["a", 1]], [["a", "b", "c"]], [["a", 1, None]], {"a": 1}])
def test_whatever_is_no_trace_draws_nothing(raw: object) -> None:
    assert waterfall.steps_of(raw) == []
    assert waterfall.start_of(raw) == Start()


def test_the_words_of_a_start_are_clean() -> None:
    assert waterfall.start_of({"kind": "warm\x1b[2J", "way": 5, "no": "field"}) == Start("warm\\x1b[2J", "5")
