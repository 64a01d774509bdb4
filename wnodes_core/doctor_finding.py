"""What a check of the doctor finds: ok, a notice, or a problem with advice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTICE = "notice"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One check's outcome: what was looked at, how it is, what was seen, what to do about it."""

    name: str
    state: State
    seen: str
    advice: str = ""


def ok(name: str, seen: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, State.OK, seen)


def notice(name: str, seen: str, advice: str) -> Finding:
    """Something that costs speed or comfort."""
    return Finding(name, State.NOTICE, seen, advice)


def problem(name: str, seen: str, advice: str) -> Finding:
    """Something that stops VMs or makes them unsafe."""
    return Finding(name, State.PROBLEM, seen, advice)
