"""Terminal and pipes of an interactive job between bsub and res: frames of type and length on one socket."""

from __future__ import annotations

import os
import socket
import struct

STDIN, STDOUT, STDERR, WINSIZE, SIGNAL = range(5)
_HEAD = struct.Struct("=BI")


def send(sock: socket.socket, kind: int, data: bytes) -> None:
    """One frame."""
    sock.sendall(_HEAD.pack(kind, len(data)) + data)


def receive(sock: socket.socket) -> tuple[int, bytes] | None:
    """One frame, or None at the end."""
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    kind, size = _HEAD.unpack(head)
    data = _exactly(sock, size)
    return None if data is None else (kind, data)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            return None
        data += piece
    return data


def write_all(fd: int, data: bytes) -> None:
    """All of it, whoever reads how slowly."""
    while data:
        data = data[os.write(fd, data) :]
