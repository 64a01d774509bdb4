"""One client's connection: a JSON object a line, bounded in size and in time.

Identity comes from the kernel (SO_PEERCRED, and SO_PEERPIDFD where it has it), never from the
client's words.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wnodes_core.errors import BadRequest

MAX_LINE = 64 << 10
FIRST_LINE_S = 10.0  # how long a client may think before it says what it wants
_HANDING = 64  # bytes of the message that open files come with
SEND_S = 10.0  # a client that does not read for so long is dropped
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5; not in Python 3.11's socket module


@dataclass
class Peer:
    """The process at the other end, as the kernel tells it; ``pidfd`` -1 if it is gone."""

    pid: int
    uid: int
    gid: int
    pidfd: int = -1

    @classmethod
    def of(cls, sock: Any) -> Peer:
        """Read the peer of a connected Unix socket. The pidfd names it for good: no reuse of its pid fools us."""
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            fd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
            os.set_inheritable(fd, False)
        except OSError:
            fd = _pidfd(pid)
        return cls(pid, uid, gid, fd)

    def close(self) -> None:
        """Let go of the pidfd."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


class Connection:
    """Reads requests from and sends replies to one client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.peer = Peer.of(writer.get_extra_info("socket"))
        self.eof = asyncio.Event()

    async def read(self, timeout_s: float | None = FIRST_LINE_S) -> dict[str, Any] | None:
        """The next message, or None at the end of the connection or of our patience.

        Raises BadRequest for a line that is no JSON object or exceeds 64 KiB.
        """
        try:
            line = await asyncio.wait_for(self._reader.readline(), timeout_s)
        except (TimeoutError, ConnectionError):
            return None
        except ValueError:
            raise BadRequest(f"request longer than {MAX_LINE} bytes") from None
        if not line.endswith(b"\n"):  # half a line and the end: nothing was asked
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise BadRequest(f"request {line[:60]!r}: want one JSON object a line") from None
        if not isinstance(message, dict):
            raise BadRequest(f"request {line[:60]!r}: want a JSON object")
        return message

    async def gone(self) -> None:
        """Return when the client has closed its end (anything it says meanwhile is dropped)."""
        with suppress(ConnectionError):
            while await self._reader.read(MAX_LINE):
                pass

    async def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Send one message, with open files if need be; False (and the connection is dropped) if it is not read."""
        line = json.dumps(message).encode() + b"\n"
        try:
            if fds:
                # asyncio's transport cannot; nothing else is in its buffer when a first answer goes out.
                with socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno())) as sock:
                    line = line[socket.send_fds(sock, [line], list(fds)) :]
            self._writer.write(line)
            await asyncio.wait_for(self._writer.drain(), SEND_S)
        except (TimeoutError, OSError, RuntimeError):
            self._writer.transport.abort()
            return False
        return True

    def hold_back(self) -> None:
        """Leave what the client sends from now on in the socket, for ``handed``."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def handed(self, count: int, timeout_s: float) -> list[int]:
        """The open files that come with the client's next message, after ``hold_back``; they are the caller's to close.

        Raises BadRequest unless it is exactly so many, in time.
        """
        loop, ready, numbers = asyncio.get_running_loop(), asyncio.Event(), array.array("i")
        with socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno())) as sock:
            loop.add_reader(sock, ready.set)
            try:
                await asyncio.wait_for(ready.wait(), timeout_s)
                room = socket.CMSG_LEN(count * numbers.itemsize)
                _, extra, flags, _ = sock.recvmsg(_HANDING, room, socket.MSG_CMSG_CLOEXEC)
            except (TimeoutError, OSError):
                raise BadRequest(f"want {count} open files within {timeout_s:g} s") from None
            finally:
                loop.remove_reader(sock)
                self._writer.transport.resume_reading()  # type: ignore[attr-defined]
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        fds = numbers.tolist()
        if len(fds) != count or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise BadRequest(f"want {count} open files in one message")
        return fds

    def close(self) -> None:
        """Close; safe to call twice."""
        self.eof.set()
        self._writer.close()
        self.peer.close()


def refusal(error: Exception) -> dict[str, Any]:
    """The reply for an error; a bug of ours tells the client no details of the node."""
    to_dict = getattr(error, "to_dict", None)
    told = to_dict() if to_dict else {
        "kind": "WnodesError", "message": f"wnodesd has a bug ({type(error).__name__})", "hint": "see wnodesd's log",
    }  # fmt: skip
    return {"ok": False, "error": told}
