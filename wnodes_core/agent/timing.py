"""One lease's trace as wnodesd knows it: its own phases, and what the keeper, a user's process, says."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from wnodes_core.trace import FIRST, KINDS, Start, Step

OWN = ("admit", "image")
_STEPS = 64
_NAME = 40
_SPAN_S = 1e7
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,79}\Z")


@dataclass
class Timing:
    """``own`` phases begin on the clock of ``time.monotonic()``, those ``told`` at ``origin``: LAUNCH called."""

    own: list[Step] = field(default_factory=list)
    told: list[Step] = field(default_factory=list)
    start: Start | None = None
    origin: float = 0.0
    # From here on: what this process has in its metrics.
    counted: int = 0  # of ``told``
    started: bool = False
    fell_back: bool = False

    def note(self, name: str, seconds: float) -> None:
        """A phase of wnodesd's own, which ends now."""
        self.own.append(Step(name, round(time.monotonic() - seconds, 4), round(seconds, 4)))

    def hear(self, message: dict[str, Any]) -> list[Step]:
        """Take a keeper's word as far as it can be true; the steps that are new, each once."""
        said = message.get("trace")
        steps = said[:_STEPS] if isinstance(said, list) else []
        self.told = [Step(step[0][:_NAME], float(step[1]), float(step[2])) for step in steps if _is_step(step)]
        self.start = _start(message.get("start")) or self.start
        origin: Any = message.get("origin")
        now = time.monotonic()
        if not self.origin:
            self.origin = float(origin) if _is_number(origin) and now - _SPAN_S < origin <= now else now
        new = self.told[self.counted :]
        self.counted += len(new)
        return new

    def shown(self) -> dict[str, Any]:
        """Trace and start as ``wnodes lease`` and observers see them: what wnodesd did before LAUNCH begins below 0."""
        origin = self.origin or min((step.begin for step in self.own), default=0.0)
        own = (Step(name, round(begin - origin, 4), seconds) for name, begin, seconds in self.own)
        steps = sorted([*own, *self.told], key=lambda step: step.begin)
        return {"trace": [list(step) for step in steps], "start": asdict(self.start) if self.start else None}

    def facts(self) -> dict[str, Any]:
        """What the journal keeps."""
        facts = {"own": self.own, "told": self.told, "origin": self.origin}
        return {**facts, "start": asdict(self.start) if self.start else None}

    @classmethod
    def from_facts(cls, data: Any) -> Timing:
        """Back from the journal; anew from one that an earlier version wrote."""
        if not isinstance(data, dict):
            return cls()
        own, told = ([Step(*step) for step in data[name]] for name in ("own", "told"))
        start = Start(**data["start"]) if data["start"] else None
        first = any(step.name == FIRST for step in told)
        return cls(own, told, start, data["origin"], len(told), first, bool(start and start.fallback))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _SPAN_S * 100  # neither NaN nor infinite


def _is_step(step: object) -> bool:
    if not isinstance(step, list) or len(step) != 3 or not isinstance(step[0], str) or step[0] in OWN:
        return False
    name, begin, seconds = step
    return _is_number(begin) and _is_number(seconds) and abs(begin) < _SPAN_S and 0 <= seconds < _SPAN_S


def _start(said: object) -> Start | None:
    if not isinstance(said, dict) or said.get("kind") not in KINDS:
        return None
    words = {each.name: str(said.get(each.name, ""))[:81] for each in fields(Start)}
    return Start(**{name: word if _WORD.match(word) else "" for name, word in words.items()})
