"""JSON messages between the processes of one slot: whole or not at all, bounded, open files beside them.

A SOCK_SEQPACKET pair: one message is one packet, so nothing is ever half read when the reader changes its user.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from wnodes_core.errors import TransientError

MAX_BYTES = 128 << 10  # below the kernel's default buffer: a message never blocks its sender
_MAX_FDS = 2


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises TransientError if the other end has gone or the message is too long."""
    data = json.dumps(message).encode()
    if len(data) > MAX_BYTES:
        raise TransientError(f"pool: a message of {len(data)} bytes: want at most {MAX_BYTES}")
    try:
        socket.send_fds(sock, [data], list(fds), socket.MSG_NOSIGNAL)
    except OSError as error:
        raise TransientError(f"pool: the other end has gone: {error}") from error


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and its open files, which are the caller's to close.

    Raises TransientError at the end of the connection, past the socket's time-out, for what is no JSON object.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(sock, MAX_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise TransientError(f"pool: the other end does not answer: {error}") from error
    try:
        if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError(f"{len(data)} bytes")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        close(fds)
        what = "the other end has gone" if not data else f"a message that is no JSON: {str(error)[:100]}"
        raise TransientError(f"pool: {what}") from None
    return message, fds


def close(fds: Sequence[int]) -> None:
    """Close open files; those that are closed already are fine."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
