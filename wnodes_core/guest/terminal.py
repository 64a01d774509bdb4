"""The launcher's own terminal: raw while the guest's command has one."""

from __future__ import annotations

import os
from typing import Any


class RawTerminal:
    """Raw mode from ``enter`` to ``leave``, also when the process ends by an exception in between."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    def enter(self) -> None:
        """Let the guest's terminal do the echo, the editing and ^C."""
        import atexit
        import termios
        import tty

        if self._saved is None and os.isatty(self._fd):
            self._saved = termios.tcgetattr(self._fd)
            atexit.register(self.leave)
            tty.setraw(self._fd)

    def leave(self) -> None:
        """Put everything back. Idempotent."""
        if self._saved is None:
            return
        import signal
        import termios

        # A background process that sets its terminal is stopped by TTOU; we may be one by now.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        except termios.error:
            pass
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self._saved = None


def size(fd: int) -> tuple[int, int]:
    """Rows and columns of a terminal, 24 x 80 where there is none."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return rows, columns
