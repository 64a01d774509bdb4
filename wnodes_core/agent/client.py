"""Ask wnodesd something and get its answer: for hooks, launchers and the command line.

Imports stay few (json, socket): every task of every VM job pays for them.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from wnodes_core.errors import TransientError, from_dict

SOCKET = "/run/wnodes/wnodesd.sock"
MAX_REPLY = 8 << 20  # a plan or a list of leases; far above any real one
_HINT = "systemctl start wnodesd"


def call(
    request: Mapping[str, Any],
    *,
    on_progress: Callable[[str], None] | None = None,
    timeout_s: float = 30.0,
    path: str = SOCKET,
) -> dict[str, Any]:
    """The daemon's answer to one request; ``on_progress`` gets its texts until then.

    ``timeout_s`` bounds the whole call.

    Raises the daemon's refusal as the WnodesError it is, TransientError if it does not answer.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _connect(sock, path, deadline)
            sock.sendall(json.dumps(dict(request)).encode() + b"\n")
            return _answer(sock, on_progress, deadline)
        except TimeoutError as error:
            raise TransientError(f"wnodesd at {path}: no answer within {timeout_s:g} s", hint=_HINT) from error
        except (OSError, ValueError) as error:
            raise TransientError(f"wnodesd at {path} does not answer: {error}", hint=_HINT) from error


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Connect; wait for a place if the tasks of a large job all come at once (unix(7): EAGAIN)."""
    while True:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(0.01)


def _answer(sock: socket.socket, on_progress: Callable[[str], None] | None, deadline: float) -> dict[str, Any]:
    buffer = bytearray()
    while True:
        line, newline, rest = buffer.partition(b"\n")
        if not newline:
            _receive(sock, buffer, deadline)
            continue
        buffer = rest
        message: dict[str, Any] = json.loads(line)
        if "progress" in message:
            if on_progress:
                on_progress(str(message["progress"]))
        elif message.get("ok"):
            return message
        else:
            raise from_dict(message.get("error") or {})


def _receive(sock: socket.socket, buffer: bytearray, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
    data = sock.recv(65536)
    if not data:
        raise ConnectionError("it closed the connection without an answer")
    buffer += data
    if len(buffer) > MAX_REPLY:
        raise ValueError(f"more than {MAX_REPLY} bytes")
