"""The reverse door: commands of the guest that are run on the host (srun, squeue, ...).

A shim in the guest hands its argv, folder, environment and stdio to the agent over
/run/wnodes/host.sock; the agent opens a stream to the host. The host decides what may run.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Any

from wnodes_core.guest import frames, guest_json, poller, pump

MAX_REQUEST = frames.MAX_TO_HOST  # a longer one would end the channel
_BECOMING = b'{"verb":"become",'  # its fds are for a command that runs here, as another account
_CHUNK = 64 << 10


class Caller:
    """One shim: its connection, and its flow once the request is complete."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.fds: list[int] = []
        self.text = b""
        self.flow: pump.Flow | None = None
        self.stream = 0

    def close(self) -> None:
        """Let go of all fds."""
        self.connection.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        if self.flow is not None:
            self.flow.close()


class Door:
    """The listening socket and its callers."""

    def __init__(self, path: str, uid: int) -> None:
        self._uid = uid
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(path)
        os.chmod(path, 0o666)
        self._listener.listen(64)
        self._next = 0
        self.callers: dict[int, Caller] = {}  # by the connection's fd

    def fds(self) -> list[int]:
        """What to poll for reading."""
        return [self._listener.fileno()] + list(self.callers)

    def flows(self) -> list[pump.Flow]:
        """The flows of the callers whose request went out."""
        return [caller.flow for caller in self.callers.values() if caller.flow is not None]

    def serve(self, fd: int, link: pump.Link) -> None:
        """Something is readable on one of our fds."""
        if fd == self._listener.fileno():
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            # What the host does for the job it does not do for another account in its VM.
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", peer)[1] not in (0, self._uid):
                connection.close()
                return
            connection.setblocking(False)
            self.callers[connection.fileno()] = Caller(connection)
        elif fd in self.callers:
            self._read(fd, self.callers[fd], link)

    def _read(self, fd: int, caller: Caller, link: pump.Link) -> None:
        room = socket.CMSG_SPACE(3 * 4)
        try:
            data, extra, _, _ = caller.connection.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, extra = b"", []
        for level, kind, payload in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                caller.fds.extend(numbers)
        caller.text += data
        if not data or len(caller.text) > MAX_REQUEST:
            self._gone(fd, link)
        elif caller.flow is None and caller.text.endswith(b"\n"):
            self._open(caller, link)

    def _open(self, caller: Caller, link: pump.Link) -> None:
        if caller.text.startswith(_BECOMING):
            self._ask(caller, link, {}, {})
            return
        fds = (caller.fds + [-1, -1, -1])[:3]
        sources, sinks = {}, {}
        for sub, fd in enumerate(fds):
            if fd < 0:
                continue
            mine, whole = poller.private(fd, writing=sub > 0)
            if sub == 0:
                sources[0] = pump.Source(mine)
            else:
                sinks[sub] = pump.Sink(mine, frames.WINDOW, whole=whole)
        for fd in caller.fds:
            os.close(fd)
        caller.fds = []
        self._ask(caller, link, sources, sinks)

    def _ask(self, caller: Caller, link: pump.Link, sources: dict[int, Any], sinks: dict[int, Any]) -> None:
        self._next += 1
        caller.stream = frames.GUEST_BIT | self._next
        caller.flow = pump.Flow(link, caller.stream, sources, sinks)
        # The shim's text is JSON of a guest's process: passed on as it is, judged by the host.
        link.send(frames.pack(frames.OPEN, 0, caller.stream, caller.text.strip()))
        for sub in sinks:
            link.send(frames.credit(sub, caller.stream, frames.WINDOW))
        caller.text = b""

    def _gone(self, fd: int, link: pump.Link) -> None:
        caller = self.callers.pop(fd)
        if caller.flow is not None:
            link.send(frames.pack(frames.CONTROL, 0, caller.stream, b'{"close":true}'))
        caller.close()

    def find(self, stream: int) -> Caller | None:
        """The caller behind a stream."""
        for caller in self.callers.values():
            if caller.stream == stream:
                return caller
        return None

    def stdio_of(self, stream: int) -> list[int]:
        """The fds 0-2 of a caller whose command runs here; whoever takes them closes them."""
        caller = self.find(stream)
        if caller is None:
            raise ValueError("its caller has gone")
        fds, caller.fds = (caller.fds + [-1, -1, -1])[:3], caller.fds[3:]
        return fds

    def ended(self, caller: Caller, ending: dict[str, Any]) -> None:
        """The host's command is over: write out the rest and tell the shim."""
        self.callers.pop(caller.connection.fileno(), None)
        if caller.flow is not None:
            for sink in caller.flow.sinks.values():
                if sink.open:
                    _drain(sink)
        try:
            caller.connection.setblocking(True)
            caller.connection.sendall(guest_json.dumps(ending) + b"\n")
        except OSError:
            pass
        caller.close()

    def close(self) -> None:
        """Close the door and every caller."""
        for caller in self.callers.values():
            caller.close()
        self.callers.clear()
        self._listener.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass


def _drain(sink: pump.Sink) -> None:
    import select

    poller = select.poll()
    poller.register(sink.fd, select.POLLOUT)
    while sink.open and sink.pending and poller.poll(2000):
        sink.flush()
