"""The same twenty jobs under every batch system, and one page that says what came of them."""

from __future__ import annotations

import fcntl
import importlib
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import table
from lrms import Lrms
from scenarios import ALL, Stage

from wnodes_core.model import Image

ADAPTERS = Path(__file__).parents[2] / "adapters"
# Name, class and marker of each; an adapter that has none fails the last test.
PLACES = {
    "local": ("local", "Local", "guest"),
    "slurm": ("slurm", "Slurm", "slurm"),
    "htcondor": ("htcondor", "Htcondor", "condor"),
    "lsf": ("lsf", "Lsf", "lsf"),
}
TITLES = {"local": "`wnodes run`", "slurm": "Slurm 22.05", "htcondor": "HTCondor 23.9", "lsf": "LSF (simulator)"}
HERE = [name for name in PLACES if name == "local" or (ADAPTERS / name).exists()]
pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@dataclass
class Play:
    """What came of the scenarios under one batch system."""

    lrms: Lrms
    verdicts: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


_played: dict[str, Play] = {}


def _class(name: str) -> type[Lrms]:
    module, cls, _ = PLACES[name]
    return getattr(importlib.import_module(f"{module}_lrms"), cls)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def play(request: pytest.FixtureRequest, minimal_image: Image) -> Play:
    """All scenarios at once on one started site; its queue lets two VMs run at a time."""
    name = request.param
    if name not in _played:
        # Two emulated guests on two cores starve each other; so does another test's guest.
        from guests import LOCK

        with open(LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _played[name] = _run(_class(name)(minimal_image), _selected(request.session.items, name))
    return _played[name]


def _selected(items: list[pytest.Item], lrms: str) -> set[str]:
    """The scenarios of this run under one batch system (pytest -k); all where no single one was named."""
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return {each["scenario"] for each in parameters if each.get("play") == lrms and "scenario" in each} or set(ALL)


def _run(lrms: Lrms, selected: set[str]) -> Play:
    played = Play(lrms)
    began = time.monotonic()
    with lrms:
        stage = Stage(lrms)
        wanted = [name for name in ALL if name in selected and name not in lrms.cannot]

        def one(name: str) -> None:
            try:
                played.verdicts[name] = ALL[name](stage)
            except Exception:  # noqa: BLE001 - the test of this scenario tells it
                played.failures[name] = traceback.format_exc()
                with suppress(Exception):
                    stage.abandon()

        with ThreadPoolExecutor(len(ALL)) as pool:
            for name in wanted:
                pool.submit(one, name)
                time.sleep(0.3)  # in order, so that the queue is full when the last come
        deadline = time.monotonic() + 20
        while (left := lrms.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        played.left = left
    played.seconds = time.monotonic() - began
    return played


@pytest.mark.parametrize("scenario", ALL)
@pytest.mark.parametrize(
    "play", [pytest.param(name, marks=getattr(pytest.mark, PLACES[name][2])) for name in HERE], indirect=True
)
def test_scenario(play: Play, scenario: str) -> None:
    if scenario in play.lrms.cannot:
        assert play.lrms.cannot[scenario], "want the reason"
        return
    assert scenario not in play.failures, play.failures[scenario]
    assert play.verdicts[scenario]


@pytest.mark.parametrize(
    "play", [pytest.param(name, marks=getattr(pytest.mark, PLACES[name][2])) for name in HERE], indirect=True
)
def test_nothing_is_left(play: Play) -> None:
    assert play.left == []


def test_the_page_says_what_was_seen() -> None:
    """The columns of those that were played in this run; what took how long is not compared."""
    if not _played:
        pytest.fail("no scenario was played: run the whole of tests/scenarios")
    old = table.parse(table.PAGE.read_text())
    seen = {play.lrms.title: _column(play, old.get(play.lrms.title)) for play in _played.values()}
    if os.environ.get("WNODES_REGENERATE") == "1":
        titles = list(TITLES.values())
        table.PAGE.write_text(table.render([{**old, **seen}[title] for title in titles if title in {**old, **seen}]))
    committed = table.parse(table.PAGE.read_text())
    for title, column in seen.items():
        assert title in committed, f"WNODES_REGENERATE=1 adds the column {title}"
        assert dict(column.cells) == dict(committed[title].cells), "WNODES_REGENERATE=1 writes the page anew"


def _column(play: Play, old: table.Column | None) -> table.Column:
    """What was seen now; what was not played stays as it was."""
    cells = dict(old.cells) if old else {}
    cells |= {name: table.cell("", reason) for name, reason in play.lrms.cannot.items()}
    cells |= {name: table.cell(play.verdicts.get(name, ""), "") for name in [*play.verdicts, *play.failures]}
    all_played = len(play.verdicts) + len(play.lrms.cannot) == len(ALL)
    seconds = f"{play.seconds:.0f}" if all_played or not old else old.seconds
    return table.Column(play.lrms.title, {name: cells.get(name, "") for name in ALL}, seconds)


def test_every_adapter_of_the_tree_is_played() -> None:
    there = {path.parent.name for path in ADAPTERS.glob("*/pyproject.toml")}
    assert there <= set(PLACES), f"no scenarios for {there - set(PLACES)}"
    assert len(ALL) == 20
    assert all(_class(name).title == TITLES[name] for name in HERE)
