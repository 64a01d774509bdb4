"""REQUEUE is bounded: the second of one job becomes HOLD, so that no job goes round for ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wnodes_core.errors import FailedAgain, Verdict, WnodesError
from wnodes_core.files import write_atomic
from wnodes_core.model import Owner

REMEMBER_S = 24 * 3600.0


class Verdicts:
    """Remembers for a day, over restarts, which jobs were requeued in which attempt."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[tuple[str, ...], float]] = self._read()

    def _read(self) -> dict[str, tuple[tuple[str, ...], float]]:
        try:
            data = json.loads(self._path.read_text())
            return {str(key): (tuple(map(str, names)), float(at)) for key, (names, at) in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # forgetting costs one requeue more

    def bound(self, error: WnodesError, job_key: str, *attempt: str) -> WnodesError:
        """The error to report: the same, or a HOLD if an earlier attempt to run this job was requeued already.

        ``attempt`` are the names of this one, any of which may have been told before: a run that had no lease
        yet is known by its root process (``run_name``). Blocks for one small write the first time it fails so.
        """
        if error.verdict is not Verdict.REQUEUE:
            return error
        with self._lock:
            return self._bound(error, job_key, attempt)

    def _bound(self, error: WnodesError, job_key: str, attempt: Sequence[str]) -> WnodesError:
        now = self._clock()
        self._seen = {k: v for k, v in self._seen.items() if now - v[1] < REMEMBER_S}
        earlier = self._seen.get(job_key)
        if earlier is None:
            self._seen[job_key] = (tuple(attempt), now)
            write_atomic(self._path, json.dumps(self._seen).encode(), mode=0o600)
            return error
        if set(earlier[0]) & set(attempt):
            return error
        return FailedAgain(f"{error.message} (the job was requeued for this once already)", hint=error.hint)


def run_name(owner: Owner) -> str:
    """One run of a job, by the process that all of it descends from."""
    return f"run of process {owner.root.pid}, born {owner.root.started}"
