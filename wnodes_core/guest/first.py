"""How long the lease's first command took to begin, and to run: the end of a start's trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from wnodes_core.guest import frames
from wnodes_core.trace import FIRST


class FirstCommand:
    """Watches one stream, from its OPEN to its EXIT, and reports seconds by phase.

    The agent sends a command's first frame (credit for its stdin, as a rule) once exec(2) has
    succeeded, so the sign costs nothing. A command that cannot start has neither phase.
    """

    def __init__(self, report: Callable[[str, float], str]) -> None:
        self._report = report
        self._stream = 0
        self._opened = self._began = 0.0

    def opened(self, stream: int) -> None:
        """A command was sent to the guest; only the first one counts."""
        if not self._opened:
            self._stream, self._opened = stream, time.monotonic()

    def saw(self, kind: int, stream: int, failed: Callable[[], Any]) -> str:
        """A frame has come; ``failed`` says of an EXIT whether the command never started.

        What it returns is for the command's launcher, before the frame.
        """
        if stream != self._stream:
            return ""
        now, said = time.monotonic(), ""
        if not self._began:
            if kind == frames.EXIT and failed():
                self._stream = 0
                return ""
            self._began = now
            said = self._report(FIRST, now - self._opened)
        if kind == frames.EXIT:
            self._stream = 0
            self._report("run", now - self._began)
        return said
