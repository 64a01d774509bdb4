"""Watching one VM's process: its end, what it said last, and whether the guest answers before it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import TypeVar

from wnodes_core import processes
from wnodes_core.errors import BootTimeout, ChannelLost, GuestPanic
from wnodes_core.files import read_tail
from wnodes_core.model import Process

T = TypeVar("T")


class Watch:
    """One VM's process (``process``, None until it was started) and its console."""

    def __init__(self, console: str) -> None:
        self.console = console
        self.process: Process | None = None

    async def while_alive(self, wanted: Awaitable[T], timeout_s: float) -> T:
        """Await something of the guest, but notice at once if the VM ends meanwhile.

        Raises GuestPanic, BootTimeout, ChannelLost and what ``wanted`` raises.
        """
        task = asyncio.ensure_future(wanted)
        death = asyncio.ensure_future(self.ended())
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout_s)
            if task.done():
                return task.result()
            if death.done():
                raise GuestPanic(f"the VM ended while it started{self.last_words()}")
            raise BootTimeout(f"the guest did not answer within {timeout_s:g} s{self.last_words()}")
        except (ChannelLost, ConnectionError) as error:
            # A closed channel is what a dying QEMU shows first: give its end a moment to be seen.
            await asyncio.wait({death}, timeout=2)
            if death.done():
                raise GuestPanic(f"the VM ended while it started{self.last_words()}") from error
            if isinstance(error, ChannelLost):
                raise
            raise ChannelLost(f"the VM's ports do not answer: {error}") from error
        finally:
            for each in (task, death):
                each.cancel()
            await asyncio.gather(task, death, return_exceptions=True)

    async def ended(self) -> None:
        """Return when the VM's process is gone."""
        fd = processes.open_pidfd(self.process) if self.process else None
        if fd is None:
            return
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        loop.add_reader(fd, _settle, gone)
        try:
            await gone
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def last_words(self) -> str:
        """The guest's last words for an error message, without control characters, or ''."""
        text = read_tail(self.console, 8000)
        said = "".join(c for c in text if c.isprintable() or c == "\n").strip().splitlines()
        # A panic's own line says why; the kernel writes a page of addresses after it.
        panic = next((number for number, line in enumerate(said) if "Kernel panic" in line), -8)
        lines = "\n".join(f"  console: {line}" for line in said[panic:][:8])
        return f"; its console ended with\n{lines}" if lines else " and wrote nothing to its console"


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
