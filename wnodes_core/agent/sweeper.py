"""The sweeper: at start and periodically, whatever nobody told us of is found and undone."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core import command
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.ending import remove_folder
from wnodes_core.agent.leases import Lease
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import CommandError, WnodesError

QUERY_S = 20.0
# One answer may be of a controller that has just come up and knows nothing yet.
MISSES = 2


class Sweeper:
    """Ends leases whose jobs are over, tries failed undos again, removes what no journal knows."""

    def __init__(self, daemon: Daemon, warm: Warm) -> None:
        self._daemon = daemon
        self._warm = warm

    async def run(self) -> None:
        """Sweep now and then every ``daemon.sweep_interval_s`` until cancelled."""
        while True:
            try:
                await self.sweep()
                self._daemon.metrics.sweeps.labels("ok").inc()
            except Exception:  # noqa: BLE001 - the sweeper is a net: it must live to sweep again
                self._daemon.metrics.sweeps.labels("failed").inc()
                log.exception("sweep failed", extra={"event": "sweep"})
            await asyncio.sleep(self._daemon.settings.daemon.sweep_interval_s)

    async def sweep(self) -> None:
        """One round."""
        self._retry()
        for (lrms, node), known in self._places().items():
            began = time.time()
            live = await self._daemon.slow(self._live, lrms, node)
            if live is not None:
                self._compare(known, live, began)
                await self._daemon.slow(self._stray_markers, lrms, node, live)
        await self._daemon.slow(self._stray_folders)
        await self._daemon.slow(self._daemon.ports.mend)
        await self._daemon.slow(self._daemon.volumes.sweep, self._known)
        await self._daemon.quick(self._daemon.accounts.reap)
        await self._daemon.slow(self._purge)
        await self._warm.tend()

    def _known(self) -> list[str]:
        """Leases of this node, also those whose journal could not be read."""
        journals = Path(self._daemon.settings.state_dir, "journal").glob("*.jsonl")
        return [*self._daemon.leases, *(path.stem for path in journals)]

    def _purge(self) -> None:
        """Make room in the image store by the site's rules."""
        purged = self._daemon.parts.store.purge(self._daemon.settings.images.purge)
        if purged:
            log.info("purged %d image files", len(purged), extra={"event": "purge"})

    def _retry(self) -> None:
        now = time.monotonic()
        for lease in list(self._daemon.leases.values()):
            if lease.tries and now >= lease.retry_at and (lease.ending is None or lease.ending.done()):
                self._daemon.end(lease, lease.reason)

    def _places(self) -> dict[tuple[str, str], list[Lease]]:
        """Which batch systems to ask about which of their nodes: where leases or markers are."""
        places: dict[tuple[str, str], list[Lease]] = defaultdict(list)
        for lease in self._daemon.leases.values():
            places[lease.job.lrms, lease.job.node].append(lease)
        for lrms, _, node, _ in self._markers():
            places.setdefault((lrms, node), [])
        return places

    def _live(self, lrms: str, node: str) -> frozenset[str] | None:
        """The jobs that are not over, or None if the batch system does not say. Blocks."""
        try:
            hook = self._daemon.parts.hook_for(lrms)
            argv = hook.wnodes_lrms_live_query(node=node)
            if not argv:
                return None
            done = command.run(argv, timeout_s=QUERY_S, environ=self._daemon.parts.environ(lrms))
            answer: frozenset[str] | None = hook.wnodes_lrms_live_parse(text=done.text)
        except (CommandError, WnodesError) as error:
            log.warning("live jobs of %s: %s", lrms, error, extra={"event": "sweep"})
            return None
        return answer

    def _compare(self, known: list[Lease], live: frozenset[str], asked: float) -> None:
        for lease in known:
            if lease.job.job_id in live or lease.created > asked - 1:
                lease.misses = 0
                continue
            lease.misses += 1
            if lease.misses >= MISSES and not lease.job_over:
                self._daemon.end(lease, "the batch system no longer knows the job", job_over=True)

    def _markers(self) -> list[tuple[str, str, str, Path]]:
        found = []
        for lrms in self._daemon.settings.lrms:
            for path in Path(self._daemon.settings.run_dir, lrms).glob("*.*"):
                job_id, _, node = path.name.partition(".")
                if job_id and node:
                    found.append((lrms, job_id, node, path))
        return found

    def _stray_markers(self, lrms: str, node: str, live: frozenset[str]) -> None:
        """A marker without a lease keeps its job from running bare; it goes when the job is over."""
        known = {lease.marker for lease in list(self._daemon.leases.values())}
        live = frozenset(job_id.replace(".", "_") for job_id in live)  # as in Job.marker
        for marked, job_id, where, path in self._markers():
            if (marked, where) != (lrms, node) or job_id in live or str(path) in known:
                continue
            if time.time() - path.stat().st_mtime > QUERY_S:
                log.warning("stray marker %s", path, extra={"event": "stray"})
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def _stray_folders(self) -> None:
        """A lease folder whose journal is gone was undone but for itself."""
        root = Path(self._daemon.settings.state_dir)
        for path in (root / "leases").iterdir():
            if not (root / "journal" / f"{path.name}.jsonl").exists() and path.name not in self._daemon.leases:
                log.warning("stray folder %s", path, extra={"event": "stray"})
                try:
                    remove_folder(str(path))
                except (OSError, CommandError) as error:
                    log.error("%s", error, extra={"event": "stray"})


class Advertiser:
    """Publishes images, warm templates and accelerator through the batch system, when they changed and at start."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def run(self) -> None:
        """Advertise at every wish for it, until cancelled."""
        self._daemon.advertise_wanted.set()
        while True:
            await self._daemon.advertise_wanted.wait()
            self._daemon.advertise_wanted.clear()
            for lrms, section in self._daemon.settings.lrms.items():
                if section.get("advertise"):
                    await self._tell(lrms, section)

    async def _tell(self, lrms: str, section: Mapping[str, Any]) -> None:
        try:
            accel = await asyncio.shield(self._daemon.accel) if self._daemon.accel else ""
            capacity: dict[str, Any] = {"accel": accel, "leases": len(self._daemon.leases)}
            node = str(section.get("node") or os.uname().nodename.split(".")[0])
            capacity["networks"] = self._daemon.settings.network.here(node)
            await self._daemon.slow(self._publish, lrms, node, capacity)
        except WnodesError as error:
            log.warning("advertise %s: %s", lrms, error, extra={"event": "advertise"})

    def _publish(self, lrms: str, node: str, capacity: dict[str, Any]) -> None:
        store = self._daemon.parts.store
        cached = [(entry.name, image.digest) for entry in store.entries() if (image := store.image(entry))]
        warm = set(self._daemon.warm_images())
        hook = self._daemon.parts.hook_for(lrms)
        environ = self._daemon.parts.environ(lrms)
        images, templates = {name for name, _ in cached}, {name for name, digest in cached if digest in warm}
        told = {**capacity, "images": sorted(images), "templates": sorted(templates)}
        query = _advertise_query(hook, node)
        if query:
            told["published"] = command.run(query, timeout_s=QUERY_S, environ=environ).text
        for argv in hook.wnodes_lrms_advertise(node=node, capacity=told) or ():
            command.run(argv, timeout_s=QUERY_S, environ=environ)


def _advertise_query(hook: Any, node: str) -> Sequence[str]:
    """The argv that shows what is published now, of adapters that want to know (an optional hook)."""
    ask = getattr(hook, "wnodes_lrms_advertise_query", None)
    answer = ask(node=node) if ask else None
    if answer and not isinstance(answer[0], str):  # without a spec, pluggy gives one answer a plug-in
        answer = answer[0]
    return answer or ()
