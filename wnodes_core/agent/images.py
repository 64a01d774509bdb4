"""Bringing a lease's image to this node in the background, and telling those who wait how far it is."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from wnodes_core.agent import metrics
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.protocol import Connection
from wnodes_core.errors import WnodesError
from wnodes_core.model import Image, ImageRef

_TELL_EVERY_S = 1.0
_TELL_FIRST_S = 0.2  # an image that is here already needs no words


class Images:
    """The image part of a lease's life."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def begin(self, lease: Lease) -> None:
        """Start the fetch; who needs the image awaits ``wait``."""
        if lease.fetch is None or lease.fetch.cancelled():
            lease.fetch = self._daemon.background(self._fetch(lease), f"image of {lease.id}")

    async def _fetch(self, lease: Lease) -> Image:
        began = time.monotonic()
        daemon = self._daemon
        try:
            entry = await daemon.quick(self.resolve, lease.request.image, lease.job.uid)
            image: Image = await daemon.fetching(self._ensure, lease, entry)
            # Shielded: an end of the lease must not come between intent and effect.
            await asyncio.shield(self._use(lease, entry))
        except WnodesError as error:
            daemon.metrics.fetches.labels("failed").inc()
            if lease.state is State.RUNNING:  # found running after our restart: it needs no fetch
                raise
            bounded = await daemon.fail(lease, error)
            daemon.end(lease, bounded.message)
            raise bounded from error
        lease.image = image
        seconds = time.monotonic() - began
        lease.timing.note("image", seconds)
        daemon.metrics.observe("image", seconds)
        daemon.metrics.fetches.labels("ok").inc()
        daemon.metrics.cache_bytes.set(await daemon.slow(metrics.bytes_below, daemon.settings.images.folder))
        daemon.advertise_wanted.set()
        log.info("image ready", extra={"event": "image", "lease": lease.id, "seconds": round(seconds, 3)})
        return image

    def resolve(self, image: str, uid: int) -> Any:
        """The catalogue's entry for what a user asks for. Blocks. Raises RequestError."""
        person = self._daemon.parts.person(uid)
        return self._daemon.parts.store.resolve(ImageRef.parse(image), person)

    def _ensure(self, lease: Lease, entry: Any) -> Image:
        def progress(done: int, total: int) -> None:
            of = f" of {total >> 20}" if total else ""
            lease.progress = f"fetching image {lease.request.image}: {done >> 20}{of} MiB"

        deadline = time.monotonic() + self._daemon.settings.images.fetch_timeout_s
        image: Image = self._daemon.parts.store.ensure(entry, progress, deadline)
        return image

    async def _use(self, lease: Lease, entry: Any) -> None:
        async with lease.lock:
            if lease.state is State.ENDING:
                raise WnodesError(f"the lease ended while its image was fetched: {lease.reason}")
            await self._daemon.quick(self._take, lease, entry)

    def _take(self, lease: Lease, entry: Any) -> None:
        with lease.journal.making_it("use", lease.id):
            self._daemon.parts.store.take(entry, lease.id, lease.job.uid)

    async def wait(self, connection: Connection, lease: Lease) -> None:
        """Return when the image is here; tell the client how far it is until then.

        Raises what the fetch failed with.
        """
        self.begin(lease)
        assert lease.fetch is not None
        told, pause = "", _TELL_FIRST_S
        while True:
            done, _ = await asyncio.wait({lease.fetch}, timeout=pause)
            pause = _TELL_EVERY_S
            if done:
                break
            if lease.progress != told:
                told = lease.progress
                if not await connection.send({"progress": told}):
                    raise ConnectionResetError
        with suppress(asyncio.CancelledError):
            lease.fetch.result()
        self._daemon.refuse_if_over(lease)
