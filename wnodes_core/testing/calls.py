"""What an adapter's author tells the contract: captured calls of the LRMS and the answers it understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from wnodes_core.api import Job, NativeCall, Phase, VmRequest, errors


class Outcome(StrEnum):
    """How a hook call can go, seen from the node."""

    GRANTED = "granted"
    HOLD = "hold"  # wnodesd refuses with this verdict
    REQUEUE = "requeue"
    DRAIN = "drain"
    AWAY = "away"  # nobody listens at wnodesd's socket
    BUG = "bug"  # our own code breaks


# What wnodesd says for each outcome; the text must reach somebody.
REFUSALS = {
    Outcome.HOLD: errors.ImageDenied("image contract-hold is not for you"),
    Outcome.REQUEUE: errors.HostBusy("node contract-requeue is full"),
    Outcome.DRAIN: errors.StateDirFull("file system contract-drain is full"),
}


@dataclass(frozen=True)
class Answer:
    """What the LRMS must see of one call.

    ``silent`` says that the LRMS lets nobody read what this call prints, so that another one must tell.
    ``commands`` are how the argv lists begin that the hook runs, in order; ``stdout`` are words that
    it prints for the LRMS; ``files`` are files that it leaves (relative to the call's folder) and a
    word in each.
    """

    exit_code: int = 0
    commands: tuple[tuple[str, ...], ...] = ()
    stdout: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    silent: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a hook as the LRMS makes it, captured from the real thing, and what must come of it.

    ``script`` is the file in the adapter's ``hooks`` folder that the LRMS starts; '' where the LRMS
    calls no script of ours. ``asks`` is the request that is read, None for an ordinary job.
    ``refused`` is the error where the user's option is malformed; its answer stands under HOLD.
    ``reads`` are the arguments that the script hands on to the adapter, where these are not its own.
    ``as_user``: the LRMS starts it as the job's user, and not as root.
    ``endless``: it prints line after line until the LRMS ends it with SIGTERM.
    ``{folder}`` in a word of ``argv`` or ``environ`` is the call's own empty folder.
    """

    name: str
    phase: Phase
    script: str = ""
    argv: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    asks: VmRequest | None = None
    job_id: str = ""
    refused: type[errors.WnodesError] | None = None
    endless: bool = False
    as_user: bool = False
    reads: tuple[str, ...] | None = None
    answers: Mapping[Outcome, Answer] = field(default_factory=dict)

    @property
    def ordinary(self) -> bool:
        """Whether this is the call of a job that wants no VM."""
        return self.asks is None and self.refused is None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Every outcome that this call can have, and whose answer must be written down."""
        if self.refused:
            return (Outcome.HOLD,)
        if self.ordinary:
            return (Outcome.GRANTED,)
        if self.phase is Phase.SUBMIT:
            return (Outcome.GRANTED, Outcome.BUG)  # no wnodesd on a submit host
        return tuple(Outcome)

    def native(self, **changes: Any) -> NativeCall:
        """As ``wnodes_lrms_read`` gets it."""
        argv = self.argv if self.reads is None else self.reads
        parts = {"argv": (self.script, *argv), "environ": dict(self.environ), "stdin": self.stdin, **changes}
        return NativeCall(self.phase, **parts)

    def placed(self, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
        """Arguments and environment with the call's folder filled in."""
        argv = tuple(word.replace("{folder}", str(folder)) for word in self.argv)
        return argv, {name: text.replace("{folder}", str(folder)) for name, text in self.environ.items()}


@dataclass(frozen=True)
class Facts:
    """Captured output of ``wnodes_lrms_facts_query`` and the facts in it: names of ``Job``'s fields."""

    job: Job
    text: str
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Live:
    """Captured output of ``wnodes_lrms_live_query`` and the jobs that are not over by it."""

    text: str
    jobs: frozenset[str]


@dataclass(frozen=True)
class TaskCall:
    """One start of the launcher by the LRMS, and the command that the LRMS meant."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    means: tuple[str, ...]
