"""Stands in for wnodesd: takes every question, gives one prepared answer, remembers what was asked."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.agent.protocol import refusal
from wnodes_core.testing.calls import REFUSALS, Outcome

_CAPACITY = {"images": ["el9"], "references": ["el9:latest"], "accel": "tcg", "leases": 0}
_STATUS = {"version": "0", "pid": 1, "since": 0, "accel": "tcg", "leases": 0, "state_dir": "/", "capacity": _CAPACITY}


class Daemon:
    """``with Daemon(run_dir, outcome) as daemon:`` - listens where hooks look for wnodesd; AWAY listens not at all."""

    def __init__(self, run_dir: Path, outcome: Outcome) -> None:
        self.path = run_dir / "wnodesd.sock"
        self.outcome = outcome
        self.asked: list[dict[str, Any]] = []
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Daemon:
        if self.outcome is not Outcome.AWAY:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.path))
            self.path.chmod(0o666)
            self._listener.listen(16)
            self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._listener is not None and self._thread is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(5)
            self._listener.close()
            self.path.unlink()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                link = listener.accept()[0]
            except OSError:
                return
            with link, suppress(OSError, ValueError), link.makefile("rw") as file:
                self.asked.append(json.loads(file.readline()))
                file.write(json.dumps(self._answer()) + "\n")

    def _answer(self) -> dict[str, Any]:
        error = REFUSALS.get(self.outcome)
        return refusal(error) if error else {"ok": True, "lease": "contract", **_STATUS}
