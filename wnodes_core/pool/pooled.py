"""A pooled VM as its keeper has it: a warden to order about, a port to its agent."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from wnodes_core.errors import TransientError
from wnodes_core.guest import handover
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.model import Disk, Process, Vm
from wnodes_core.pool import wire

ORDER_S = 5.0
_END_S = 5.0


@dataclass
class Pooled:
    """Made by a waiting keeper; used from the job's user's lifecycle on."""

    warden: socket.socket
    port: socket.socket
    process: Process
    facts: dict[str, Any]
    nice: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def resume(self, vm: Vm) -> GuestChannel:
        """Give it the job's memory and CPUs and let it run; its channel. Raises TransientError."""
        order: dict[str, Any] = {"memory_mib": vm.memory_mib, "cpuset": list(vm.cpuset), "nice": self.nice}
        await asyncio.to_thread(self._ask, "resume", ORDER_S, **order)
        return await handover.go_on(self.port, self.facts)

    def pause(self, paused: bool) -> None:
        """Stop or continue it. Blocks. Raises TransientError."""
        self._ask("pause", ORDER_S, paused=paused)

    def plug(self, disk: Disk, fd: int) -> bool:
        """Plug a disk in, by its open file. Blocks. Raises TransientError."""
        self._ask("plug", ORDER_S, (fd,), disk=asdict(disk))
        return True

    def end(self) -> None:
        """End it; fine if it has ended. Blocks.

        Raises TransientError if it goes on; its warden then hears that we have gone.
        """
        if self.warden.fileno() < 0:
            return
        try:
            self._ask("end", _END_S)
        except TransientError:
            if _there(self.process):
                raise
        finally:
            self.warden.close()

    def _ask(self, order: str, timeout_s: float, fds: Sequence[int] = (), **given: Any) -> None:
        with self._lock:
            self.warden.settimeout(timeout_s)
            wire.send(self.warden, {"do": order, **given}, fds)
            answer, fds = wire.receive(self.warden)
        wire.close(fds)
        if not answer.get("ok"):
            raise TransientError(f"pooled VM: {order}: {str(answer.get('error'))[:500]}")


def _there(process: Process) -> bool:
    return os.path.exists(f"/proc/{process.pid}")
