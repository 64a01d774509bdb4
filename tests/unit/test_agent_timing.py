"""What a keeper, a user's process, tells of its start: bounded, counted once, never believed too much."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from wnodes_core.agent.metrics import PHASES, Metrics
from wnodes_core.agent.timing import Timing
from wnodes_core.trace import FIRST, Start, Step

GOOD = [["launcher", 0.0, 0.1], ["clone", 0.1, 0.2], [FIRST, 0.3, 0.1]]
WARM = {"kind": "warm", "way": "mapped", "template": "deb-1", "fallback": ""}


def told(**message: Any) -> dict[str, Any]:
    """A message as it crosses the socket."""
    found: dict[str, Any] = json.loads(json.dumps({"trace": GOOD, "start": WARM, **message}))
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_own_phases_are_set_against_the_moment_of_launch() -> None:
    timing = Timing()
    timing.note("admit", 0.5)
    assert timing.shown() == {"trace": [["admit", 0.0, 0.5]], "start": None}
    timing.hear(told(origin=time.monotonic() + 0.0))
    steps = timing.shown()["trace"]
    assert [step[0] for step in steps] == ["admit", "launcher", "clone", FIRST]
    assert steps[0][1] == pytest.approx(-0.5, abs=0.1)
    assert timing.shown()["start"] == WARM


def test_it_survives_the_journal_and_is_not_counted_again() -> None:
    timing = Timing()
    timing.note("admit", 0.5)
    assert timing.hear(told(start={**WARM, "fallback": "BootTimeout"})) == [Step(*step) for step in GOOD]
    again = Timing.from_facts(json.loads(json.dumps(timing.facts())))
    assert again.shown() == timing.shown()
    metrics = Metrics()
    metrics.heard(again, again.hear(told(start={**WARM, "fallback": "BootTimeout"})))
    assert value(metrics, "wnodes_lease_start_seconds_count", kind="warm") == 0
    assert value(metrics, "wnodes_start_fallbacks_total", reason="BootTimeout") == 0
    assert Timing.from_facts([["boot", 1.0]]) == Timing()


HOSTILE = [
    None, 3, "x", {}, [None], [[]], [["a", 1]], [["a", 0, -1]], [["a", 0, float("nan")]], [["a", float("inf"), 1]],
    [["a", 0, 10**400]], [["a", "0", "1"]], [[["a"], 0, 1]], [["admit", 0, 1]], [["image", 0, 1]], [["a", 0, 1, 2]],
]  # fmt: skip


@pytest.mark.parametrize("trace", HOSTILE, ids=str)
def test_what_is_no_step_is_not_heard(trace: object) -> None:
    timing = Timing()
    assert timing.hear(told(trace=trace)) == []
    assert timing.told == []


@pytest.mark.parametrize("start", [None, 3, [], {}, {"kind": "hot"}, {"kind": ["cold"]}, {"kind": None}])
def test_what_is_no_start_changes_nothing(start: object) -> None:
    timing = Timing(start=Start("pool"))
    timing.hear(told(start=start))
    assert timing.start == Start("pool")


def test_names_and_words_are_bounded() -> None:
    timing = Timing()
    words = {"kind": "warm", "way": "x" * 9000, "template": "a\nb", "fallback": {"a": 1}}
    timing.hear(told(trace=[["n" * 9000, 0, 1]] * 500, start=words))
    assert (len(timing.told), len(timing.told[0].name)) == (64, 40)
    assert timing.start == Start("warm")
    for _ in range(9):
        timing.hear(told(trace=[["admit", 0, 1]] * 64))
    assert timing.shown()["trace"] == []


@pytest.mark.parametrize("origin", [None, "x", -1e18, 1e18, float("nan"), 10**400, [1]])
def test_a_moment_of_launch_that_cannot_be_is_now(origin: object) -> None:
    timing = Timing()
    timing.hear(told(origin=origin))
    assert timing.origin == pytest.approx(time.monotonic(), abs=5)
    first = timing.origin
    timing.hear(told(origin=time.monotonic() - 3))
    assert timing.origin == first


def test_a_start_and_a_fallback_are_counted_once_a_lease() -> None:
    metrics, timing = Metrics(), Timing()
    for count in (1, 2, 3, 3, 3):
        metrics.heard(timing, timing.hear(told(trace=GOOD[:count])))
    assert value(metrics, "wnodes_lease_start_seconds_count", kind="warm") == 1
    assert value(metrics, "wnodes_lease_start_seconds_sum", kind="warm") == pytest.approx(0.4)
    assert value(metrics, "wnodes_lease_phase_seconds_count", phase="clone") == 1
    for reason in ("IdentityError", "", "BootTimeout"):
        fallen = {"kind": "cold", "fallback": reason}
        metrics.heard(timing, timing.hear(told(trace=[*GOOD, [FIRST, 0.0, 9.0]], start=fallen)))
    assert value(metrics, "wnodes_start_fallbacks_total", reason="IdentityError") == 1
    assert value(metrics, "wnodes_start_fallbacks_total", reason="BootTimeout") == 0
    assert value(metrics, "wnodes_lease_start_seconds_count", kind="cold") == 0


def test_labels_are_a_fixed_set() -> None:
    metrics = Metrics()
    for number in range(200):
        timing = Timing()
        said = {"kind": "cold", "fallback": f"Reason{number}"}
        metrics.heard(timing, timing.hear(told(trace=[[f"phase{number}", 0, 1]], start=said)))
    lines = metrics.text().decode().splitlines()
    assert sum("wnodes_start_fallbacks_total{" in line for line in lines) == 1
    assert value(metrics, "wnodes_start_fallbacks_total", reason="other") == 200
    assert value(metrics, "wnodes_lease_phase_seconds_count", phase="other") == 200
    assert FIRST in PHASES and {"launcher", "lease", "keeper", "clone", "wake"} <= set(PHASES)


def test_gauges_are_read_where_the_templates_are() -> None:
    warm = {"templates": 3, "pool_idle": 2}
    metrics = Metrics(warm=lambda: warm)
    text = metrics.text().decode()
    assert "wnodes_templates 3.0\n" in text and "wnodes_pool_idle 2.0\n" in text
    assert "wnodes_templates 0.0\n" in Metrics().text().decode()
