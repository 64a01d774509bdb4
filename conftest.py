"""How two workers of one run (pytest-xdist) share out the tests: by file, and never like beside like."""

from __future__ import annotations

import re
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent
# "guests": two emulated guests starve each other on two CPUs, so these take one lock (tests/guests.py), and in two
# workers one would wait. "slurm": a job's processes tell its number, and all Slurms of a machine count from 1. What is
# long comes first, so that the many short ones fill up the end.
LANES = ("guests", "slurm", "lrms", "")


@cache
def lane(path: str) -> str:
    """The lane of a test file, by the markers that its text names; '' is any worker's."""
    marks = set(re.findall(r"pytest\.mark\.(guest|slurm|condor|lsf)\b", (HERE / path).read_text()))
    if "slurm" in marks:
        return "slurm"
    if marks & {"condor", "lsf"}:
        return "lrms"
    return "guests" if marks else ""


class Lanes(LoadScopeScheduling):
    """A worker is given a file, or all files of a lane; not xdist's groups, which pytest 9.2 no longer lets it note."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return name if (name := lane(path)) in ("guests", "slurm") else path


def pytest_configure() -> None:
    """A shell without job control starts what it puts behind itself deaf to SIGINT; our tests send it to their own."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """Our sharing out, in the order of collection."""
    config.option.loadscopereorder = False
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The lanes in their order. Raises UsageError for a test with a marker that its file does not name."""
    for item in items:
        if {"guest", "slurm", "condor", "lsf"} & {mark.name for mark in item.iter_markers()} and not lane(_file(item)):
            raise pytest.UsageError(f"{item.nodeid}: want its marker in its own file")
    # An adapter's contract takes half a minute: collected last, one would be all that a worker is waited for.
    items.sort(key=lambda item: (LANES.index(lane(_file(item))), not _file(item).startswith("adapters/")))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
