"""QEMU's own monitor (QMP), for a VM that libvirt does not watch. Blocking, one command at a time.

https://www.qemu.org/docs/master/interop/qmp-spec.html: a greeting, then a JSON object a line; events come
between the answers and are dropped. The peer is our own QEMU, but of a guest that may have taken it
over: lines are bounded, and so is the time.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from wnodes_core.api import errors

_MAX_LINE = 4 << 20
COMMAND_S = 10.0


class Monitor:
    """The monitor of one QEMU. Safe to use from several threads."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = sock
        self._name = name
        self._rest = b""
        self._lock = threading.Lock()
        self._greeted = False

    def ask(self, command: str, *, timeout_s: float = COMMAND_S, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """The answer to one command; ``fds`` are open files that go with it.

        Raises TransientError if QEMU refuses it, has gone, or does not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if not self._greeted:
                self._line(deadline)
                self._greeted = True
                self._answer("qmp_capabilities", {}, deadline)
            return self._answer(command, arguments, deadline, fds)

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()

    def _answer(self, command: str, arguments: dict[str, Any], deadline: float, fds: Sequence[int] = ()) -> Any:
        order: dict[str, Any] = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = json.dumps(order).encode() + b"\n"
            sent = socket.send_fds(self._socket, [data], list(fds)) if fds else 0
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise errors.TransientError(f"VM {self._name}: its monitor does not listen: {error}") from error
        while True:
            said = self._line(deadline)
            if time.monotonic() > deadline:  # a QEMU that never stops telling events
                raise errors.TransientError(f"VM {self._name}: {command}: no answer in time")
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise errors.TransientError(f"VM {self._name}: {command}: {str(said['error'])[:500]}")

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._rest:
            if len(self._rest) > _MAX_LINE:
                raise errors.TransientError(f"VM {self._name}: its monitor says more than {_MAX_LINE} bytes in a line")
            try:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                data = self._socket.recv(65536)
            except OSError as error:
                raise errors.TransientError(f"VM {self._name}: its monitor does not answer: {error}") from error
            if not data:
                raise errors.TransientError(f"VM {self._name}: its QEMU has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise errors.TransientError(f"VM {self._name}: its monitor says {line[:60]!r}: want JSON")
        return said
