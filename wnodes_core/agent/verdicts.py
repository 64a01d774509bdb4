"""REQUEUE is bounded: the second of one job becomes HOLD, so that no job goes round for ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wnodes_core.errors import FailedAgain, Verdict, WnodesError
from wnodes_core.files import write_atomic

REMEMBER_S = 24 * 3600.0


class Verdicts:
    """Remembers for a day, over restarts, which jobs were requeued in which lease."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str, float]] = self._read()

    def _read(self) -> dict[str, tuple[str, float]]:
        try:
            data = json.loads(self._path.read_text())
            return {str(key): (str(lease), float(at)) for key, (lease, at) in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # forgetting costs one requeue more

    def bound(self, error: WnodesError, job_key: str, lease_id: str) -> WnodesError:
        """The error to report: the same, or a HOLD if an earlier lease of this job was requeued already.

        Blocks for one small write the first time a lease fails so.
        """
        if error.verdict is not Verdict.REQUEUE:
            return error
        with self._lock:
            return self._bound(error, job_key, lease_id)

    def _bound(self, error: WnodesError, job_key: str, lease_id: str) -> WnodesError:
        now = self._clock()
        self._seen = {k: v for k, v in self._seen.items() if now - v[1] < REMEMBER_S}
        earlier = self._seen.get(job_key)
        if earlier is None:
            self._seen[job_key] = (lease_id, now)
            write_atomic(self._path, json.dumps(self._seen).encode(), mode=0o600)
            return error
        if earlier[0] == lease_id:
            return error
        return FailedAgain(f"{error.message} (the job was requeued for this once already)", hint=error.hint)
