"""One small progress bar: for people at a terminal, plain lines for a log, nothing for less than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_WIDTH = 24
_REDRAW_S = 0.1
_LINE_S = 5.0


def human(count: float) -> str:
    """Bytes for people.

    >>> human(999), human(1500), human(2_500_000_000)
    ('999 B', '1.5 kB', '2.5 GB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


class Bar:
    """Progress of one fetch; call it with (bytes so far, bytes in all or 0), then ``close`` it.

    On a terminal it redraws one line; elsewhere it prints a line now and then.
    """

    def __init__(
        self,
        label: str,
        *,
        stream: TextIO | None = None,
        delay_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._clock = clock
        self._began = clock()
        self._next = self._began + delay_s
        self._first: int | None = None
        self._drawn = 0

    def __call__(self, done: int, total: int) -> None:
        """Take note, and draw if it is time to."""
        now = self._clock()
        if self._first is None or done < self._first:
            self._first, self._began = done, now
        if now < self._next:
            return
        self._next = now + (_REDRAW_S if self._tty else _LINE_S)
        rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        self._draw(self.line(done, total, rate))

    def line(self, done: int, total: int, rate: float) -> str:
        """The text: how much, how fast, how long still."""
        speed = f"  {human(rate)}/s" if rate else ""
        if not total:
            return f"{self._label}  {human(done)}{speed}"
        left = (total - done) / rate if rate else 0
        eta = f"  {int(left) // 60}:{int(left) % 60:02d} left" if rate and done < total else ""
        share = min(1.0, done / total)
        bar = ""
        if self._tty:
            full = round(share * _WIDTH)
            bar = f" [{'#' * full}{'.' * (_WIDTH - full)}]"
        return f"{self._label}{bar} {share:4.0%}  {human(done)} of {human(total)}{speed}{eta}"

    def _draw(self, text: str) -> None:
        if self._tty:
            self._stream.write("\r" + text.ljust(self._drawn))
            self._drawn = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the bar away, so that what follows starts on a clean line."""
        if self._tty and self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()
            self._drawn = 0
