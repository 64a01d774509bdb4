"""What a scenario needs of a batch system, in nobody's words; one class for each of them translates.

A job's script finds ``$W`` (a folder that host and guest both see) and ``$K`` (its own prefix in there).
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnodes_core import processes
from wnodes_core.model import Image, Process

IMAGE = "debian12"


class Refused(Exception):
    """The batch system did not take the job; the text is what its user reads."""


@dataclass(frozen=True)
class Ask:
    """A job as a scenario wishes it; 0 is "whatever the site gives"."""

    key: str
    script: str
    stdin: Path | None = None
    time_s: int = 0
    memory_mib: int = 0
    count: int = 1
    image: str = IMAGE
    start: str = "auto"  # or "cold": booted, where the site would clone it

    def text(self, work: Path) -> str:
        """The script with its two variables."""
        return f"W={shlex.quote(str(work))} K={shlex.quote(self.key)}\n{self.script}\n"


@dataclass(frozen=True)
class End:
    """How a job ended: in the batch system's own words, and what code or signal its user sees (None: none)."""

    native: str
    code: int | None = None
    signal: int | None = None


class Lrms(ABC):
    """One started site. Jobs are named by text."""

    name = ""
    title = ""
    at_once = 2  # VMs
    cannot: dict[str, str] = {}  # scenario: why it cannot hold here

    def __init__(self, image: Image) -> None:
        self.image = image

    @property
    @abstractmethod
    def work(self) -> Path:
        """The folder that jobs are submitted from, seen in the guest at the same path."""

    @abstractmethod
    def __enter__(self) -> Lrms: ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...

    @abstractmethod
    def submit(self, ask: Ask) -> str:
        """Submit a job. Raises Refused."""

    @abstractmethod
    def cancel(self, job: str) -> None:
        """As its user would."""

    @abstractmethod
    def end(self, job: str) -> End:
        """Wait until it is over."""

    @abstractmethod
    def output(self, job: str) -> bytes:
        """Its standard output."""

    @abstractmethod
    def said(self, job: str) -> str:
        """All that its user can read about it but its standard output."""

    @abstractmethod
    def lease(self, job: str) -> dict[str, Any]:
        """Its lease, living or ended: ``id``, ``keeper_pid``, ``keeper_state``; {} if there is none."""

    @abstractmethod
    def queued(self, job: str) -> bool:
        """Whether it waits for its start."""

    @abstractmethod
    def left(self) -> list[str]:
        """What jobs left behind on the node."""

    def signal(self, job: str, name: str) -> None:
        """Send a signal to the job."""
        raise NotImplementedError

    def requeue(self, job: str) -> None:
        """Have it run anew."""
        raise NotImplementedError

    def hurry(self, job: str) -> None:  # noqa: B027 - most need not
        """Let a time limit come soon, where the batch system counts in minutes."""

    def about(self, job: str) -> str:
        """What helps to see why a job did not end as it should."""
        return self.said(job)[-2000:]

    def abandon(self, job: str) -> None:
        """A scenario failed: its job must not stand in the others' way."""
        self.cancel(job)

    def elements(self, job: str, count: int) -> list[str]:
        """The jobs of an array."""
        raise NotImplementedError


def keeper(lease: dict[str, Any]) -> Process | None:
    """The lease's keeper, while it lives."""
    return processes.read(lease["keeper_pid"]) if lease.get("keeper_pid") else None


def qemu(lease: dict[str, Any]) -> Process | None:
    """The lease's QEMU, while it lives."""
    named = f"guest=wnodes-{lease.get('id')},"
    return next((p for p in processes.table() if any(word.startswith(named) for word in p.command)), None)


Wait = Callable[..., Any]
