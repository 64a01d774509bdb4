"""The keeper's side of its lease: one open connection to wnodesd, renewed after a restart of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from wnodes_core.errors import TransientError, WnodesError, from_dict

CLAIM_TIMEOUT_S = 30.0
RETRY_S = 0.5
_MAX_FDS = 32  # the most that wnodesd sends at once: an end of each gateway of an account
VERDICT_S = 3.0


class Holding:
    """Holds a lease by an open connection. ``claim`` first, then ``start`` inside the event loop."""

    def __init__(self, daemon: str, lease: str, token: str) -> None:
        self.daemon = daemon
        self.hello = {"op": "hold", "lease": lease, "token": token}
        self._socket: socket.socket | None = None
        self.fds: list[int] = []  # what the daemon handed us open with its grant
        self._writer: asyncio.StreamWriter | None = None
        self._last: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._finished = False
        self._verdict: asyncio.Future[WnodesError] | None = None

    def claim(self) -> None:
        """Claim the lease and wait for the grant: by then we are in the cgroup we belong to.

        Raises the daemon's refusal, or TransientError if it does not answer.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(CLAIM_TIMEOUT_S)
        try:
            _connect(sock, self.daemon)
            sock.sendall(json.dumps(self.hello).encode() + b"\n")
            reply, self.fds = read_line(sock)
        except OSError as error:
            raise TransientError(f"wnodesd at {self.daemon} does not answer: {error}") from error
        if not reply.get("ok"):
            raise from_dict(reply.get("error", {}))
        self._socket = sock

    def start(self, on_end: Callable[[str], None]) -> None:
        """Watch the connection from the event loop; ``on_end(reason)`` when the lease is over."""
        self._task = asyncio.ensure_future(self._keep(on_end))

    async def verdict(self, error: WnodesError) -> WnodesError:
        """What wnodesd makes of a failure that it was just told; the failure itself if it does not say."""
        self._verdict = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._verdict, VERDICT_S)
        return error

    def tell(self, facts: dict[str, Any]) -> None:
        """Tell wnodesd a change of state; what cannot be told now is told on reconnection."""
        self._last = facts
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(json.dumps(facts).encode() + b"\n")

    async def finish(self, facts: dict[str, Any]) -> None:
        """Say the last word and close, which releases the lease."""
        self._finished = True
        self.tell(facts)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.drain(), 2)
            self._writer.close()

    async def _keep(self, on_end: Callable[[str], None]) -> None:
        while not self._finished:
            try:
                reader = await self._connected()
                await self._listen(reader, on_end)
            except (OSError, ValueError):
                pass  # wnodesd restarts: the job goes on, we come back with the same token
            self._writer = None
            await asyncio.sleep(RETRY_S)

    async def _connected(self) -> asyncio.StreamReader:
        if self._socket is not None:
            self._socket.setblocking(False)
            reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
            self._socket = None
        else:
            reader, self._writer = await asyncio.open_unix_connection(self.daemon)
            self._writer.write(json.dumps(self.hello).encode() + b"\n")
        if self._last is not None:
            self._writer.write(json.dumps(self._last).encode() + b"\n")
        return reader

    async def _listen(self, reader: asyncio.StreamReader, on_end: Callable[[str], None]) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if message.get("op") == "end":
                on_end(str(message.get("reason", "ended by wnodesd")))
            elif message.get("op") == "verdict" and self._verdict is not None and not self._verdict.done():
                self._verdict.set_result(from_dict(message.get("error", {})))
            elif message.get("ok") is False:
                # The daemon that came back does not know us: the lease is over.
                on_end(str(message.get("error", {}).get("message", "lease refused")))


def _connect(sock: socket.socket, path: str) -> None:
    """Connect; wait for a place if the daemon's queue is full (unix(7): EAGAIN)."""
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def read_line(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One answer of wnodesd's, and the open files that came with it. Raises OSError."""
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    line, handed = b"", []
    while not line.endswith(b"\n"):
        # One byte at a time: what follows the line belongs to the event loop's reader.
        byte, fds, _, _ = socket.recv_fds(sock, 1, _MAX_FDS)
        handed += fds
        if not byte or time.monotonic() > deadline:
            raise OSError("connection closed")
        line += byte
    reply: dict[str, Any] = json.loads(line)
    return reply, handed
