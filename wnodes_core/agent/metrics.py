"""Figures for Prometheus, with its own client library; scraped over a Unix socket or loopback."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from wnodes_core import __version__
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.timing import Timing
from wnodes_core.errors import SettingsError, kinds
from wnodes_core.trace import FIRST, Start, Step

# Phases come from keepers, which are users' processes: a fixed set bounds the labels.
PHASES = (
    *("queue", "admit", "image", "template", "launcher", "lease", "keeper", "overlay", "define", "boot"),
    *("clone", "wake", "grow", "claim", "agent", "network", "mount", FIRST, "run", "teardown"),
)
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 1800)
# How a start came to be no clone: kinds of ours and no words of a user's.
REASONS = frozenset(kinds())
_REQUEST_S = 5.0
# Any user may connect, and no scraper needs more: open files and time are wnodesd's, not theirs.
_MAX_SCRAPERS = 32
_FRESH_S = 1.0


class Metrics:
    """What is counted; ``text()`` is the exposition. Leases by state are counted when asked."""

    def __init__(
        self, leases: Callable[[], Iterable[Lease]] = list, warm: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self.registry = CollectorRegistry()
        self._leases = leases
        self._warm = warm
        self._scrapers = 0
        self._said: tuple[float, bytes] = (-_FRESH_S, b"")
        own = self.registry
        self._states = Gauge("wnodes_leases", "Leases on this node", ["state"], registry=own)
        name = "wnodes_lease_phase_seconds"
        self._phase = Histogram(name, "Time in a phase", ["phase"], buckets=BUCKETS, registry=own)
        name = "wnodes_lease_start_seconds"
        self._start = Histogram(
            name, "LAUNCH called to the user's first instruction", ["kind"], buckets=BUCKETS, registry=own
        )
        self._fallbacks = Counter("wnodes_start_fallbacks", "Clones that became boots", ["reason"], registry=own)
        self._templates = Gauge("wnodes_templates", "Images with a warm template on this node", registry=own)
        self._idle = Gauge("wnodes_pool_idle", "Clones that wait for a job", registry=own)
        self.cache_bytes = Gauge("wnodes_image_cache_bytes", "Bytes of images on this node", registry=own)
        self.fetches = Counter("wnodes_image_fetches", "Images asked of the store", ["outcome"], registry=own)
        self.errors = Counter("wnodes_errors", "Errors told to a job", ["verdict"], registry=own)
        self.sweeps = Counter("wnodes_sweeps", "Runs of the sweeper", ["outcome"], registry=own)
        self.refused = Counter("wnodes_clients_refused", "Clients turned away", ["why"], registry=own)
        Info("wnodes_build", "This wnodesd", registry=own).info({"version": __version__})

    def observe(self, phase: str, seconds: float) -> None:
        """Count one phase of one lease."""
        self._phase.labels(phase if phase in PHASES else "other").observe(seconds)

    def heard(self, timing: Timing, new: Iterable[Step]) -> None:
        """Count what a keeper has told, a start and a fallback once a lease."""
        start = timing.start or Start()
        if start.fallback and not timing.fell_back:
            timing.fell_back = True
            self._fallbacks.labels(start.fallback if start.fallback in REASONS else "other").inc()
        for step in new:
            self.observe(step.name, step.seconds)
            if step.name == FIRST and not timing.started:
                timing.started = True
                self._start.labels(start.kind).observe(max(0.0, step.end))

    def text(self) -> bytes:
        """The exposition in Prometheus' text format; no older than a second."""
        if time.monotonic() - self._said[0] < _FRESH_S:
            return self._said[1]
        counted = Count(str(lease.state) for lease in self._leases())
        for state in State:
            self._states.labels(str(state)).set(counted.get(str(state), 0))
        warm = self._warm()
        self._templates.set(warm.get("templates", 0))
        self._idle.set(warm.get("pool_idle", 0))
        self._said = (time.monotonic(), bytes(generate_latest(self.registry)))
        return self._said[1]

    async def serve(self, where: str) -> asyncio.AbstractServer:
        """Answer ``GET /metrics`` on ``unix:PATH`` or ``127.0.0.1:PORT``.

        Raises SettingsError for an address that is not loopback.
        """
        if where.startswith("unix:"):
            path = where.removeprefix("unix:")
            with suppress(FileNotFoundError):
                os.unlink(path)
            server = await asyncio.start_unix_server(self._answer, path, limit=8192)
            os.chmod(path, 0o666)
            return server
        host, port = loopback(where)
        return await asyncio.start_server(self._answer, host, port, limit=8192)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._scrapers >= _MAX_SCRAPERS:
            writer.transport.abort()
            return
        self._scrapers += 1
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
            status, body = self._reply(head.split(b" ", 2))
            kind = CONTENT_TYPE_LATEST if status == "200 OK" else "text/plain"
            lines = (f"HTTP/1.0 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "", "")
            writer.write("\r\n".join(lines).encode() + body)
            await asyncio.wait_for(writer.drain(), _REQUEST_S)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._scrapers -= 1
            writer.close()

    def _reply(self, words: list[bytes]) -> tuple[str, bytes]:
        if words[0] != b"GET":
            return "405 Method Not Allowed", b"GET /metrics\n"
        if len(words) < 2 or words[1].split(b"?")[0] != b"/metrics":
            return "404 Not Found", b"GET /metrics\n"
        return "200 OK", self.text()


def loopback(where: str) -> tuple[str, int]:
    """Host and port of a loopback address.

    >>> loopback("127.0.0.1:9100"), loopback("[::1]:9100")
    (('127.0.0.1', 9100), ('::1', 9100))

    Raises SettingsError.
    """
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    try:
        if ipaddress.ip_address(host).is_loopback and 0 <= int(port) < 65536:
            return host, int(port)
    except ValueError:
        pass
    raise SettingsError(f"daemon.metrics {where!r}: want unix:PATH or a loopback address as in 127.0.0.1:9100")


def bytes_below(folder: str) -> int:
    """Bytes of all files below a folder, sparse ones at their true size."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_blocks * 512
    return total
