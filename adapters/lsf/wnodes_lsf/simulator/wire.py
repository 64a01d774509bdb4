"""One JSON object a connection each way, with file descriptors; who asks is told by the kernel."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any


class Refused(Exception):
    """What the other side answered instead."""


def ask(path: str, message: dict[str, Any], fds: list[int] | None = None, timeout_s: float = 30.0) -> dict[str, Any]:
    """Send one message and return the answer. Raises Refused, OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout_s)
        sock.connect(path)
        send(sock, message, fds or [])
        answer, _ = receive(sock)
    if "error" in answer:
        raise Refused(str(answer["error"]))
    return answer


def send(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """One message; descriptors go with its first byte."""
    data = json.dumps(message).encode()
    head = struct.pack("=I", len(data))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([head], rights)
    sock.sendall(data)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One message and its descriptors. Raises OSError at the end of the connection."""
    head, ancillary, _, _ = sock.recvmsg(4, socket.CMSG_SPACE(16))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    while len(head) < 4:
        head += _some(sock, 4 - len(head))
    left, data = struct.unpack("=I", head)[0], b""
    parts = []
    while left:
        data = _some(sock, min(left, 1 << 20))
        parts.append(data)
        left -= len(data)
    message: dict[str, Any] = json.loads(b"".join(parts))
    return message, list(fds)


def _some(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size)
    if not data:
        raise ConnectionError("connection closed")
    return data


def listen(path: str, mode: int) -> socket.socket:
    """A listening socket."""
    if os.path.lexists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    os.chmod(path, mode)
    sock.listen(64)
    return sock


def peer(sock: socket.socket) -> tuple[int, int]:
    """uid and gid of the process at the other end."""
    _, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, gid
