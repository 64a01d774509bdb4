"""What this node can take now, in a file that everybody may read: for programs that tell a batch system.

``RUN_DIR/capacity``, replaced whole at each change, one fact a line::

    wnodesd PID STARTED      the process that keeps it true, and the clock tick of its birth
    accel NAME               kvm or tcg: what was proved to run here; not there while nothing is
    slots N                  how many more VMs this node takes
    image NAME               an image that is in the node's cache
    reference NAME:TAG       the same with its tag
    template NAME            one of them that is started warm

A reader that finds no such process counts no slots: a wnodesd that was killed cannot take its words back.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from wnodes_core import processes
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import State
from wnodes_core.files import write_atomic
from wnodes_core.templates.shelf import Shelf


class Capacity:
    """Keeps the file true while wnodesd runs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._path = f"{daemon.settings.run_dir}/capacity"
        self._written = ""

    async def run(self) -> None:
        """Write at each change of a lease, and once in a sweep's interval for what nobody tells; until cancelled."""
        changed = self._daemon.leases_changed
        if self._daemon.accel is not None:
            self._daemon.accel.add_done_callback(lambda _: changed.set())
        while True:
            changed.clear()
            taken = sum(1 for lease in self._daemon.leases.values() if lease.state is not State.OVER)
            try:
                await self._daemon.slow(self._write, taken)
            except Exception:  # noqa: BLE001 - the file is a service: it may not end wnodesd, nor end with one failure
                log.exception("%s not written", self._path, extra={"event": "capacity"})
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), self._daemon.settings.daemon.sweep_interval_s)

    def _write(self, taken: int) -> None:
        text = self._text(taken)
        if text != self._written or not os.path.exists(self._path):
            write_atomic(self._path, text.encode(), mode=0o644)
            self._written = text

    def _text(self, taken: int) -> str:
        settings, store = self._daemon.settings, self._daemon.parts.store
        me = processes.read(os.getpid())
        slots = settings.daemon.slots or len(os.sched_getaffinity(0))
        entries = [entry for entry in store.entries() if store.image(entry)]
        warm = {kept.template.image for kept in Shelf(settings.warm.folder).all()}
        lines = [f"wnodesd {os.getpid()} {me.started if me else 0}", f"slots {max(0, slots - taken)}"]
        lines += [f"accel {self._accel()}"] if self._accel() else []
        lines += [f"reference {name}" for name in sorted(map(str, entries))]
        lines += [f"image {name}" for name in sorted({entry.name for entry in entries})]
        lines += [f"template {name}" for name in sorted({e.name for e in entries if warm and e.disk.digest in warm})]
        return "\n".join(lines) + "\n"

    def _accel(self) -> str:
        accel = self._daemon.accel
        return accel.result() if accel is not None and accel.done() and not accel.exception() else ""
