"""The keeper's switchboard: launchers on one side, the guest's agent on the other.

Serves ``keeper.sock`` to the processes of the job's user. Frames are passed on with their
stream id rewritten; credit is end to end, so nothing piles up here. Before the guest is ready
launchers hear progress; what they ask meanwhile waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from wnodes_core.errors import ChannelLost, WnodesError
from wnodes_core.guest import frames
from wnodes_core.guest.channel import GuestChannel, decode
from wnodes_core.guest.first import FirstCommand

_MAX_BACKLOG = 64 << 20  # frames but DATA that a launcher or the guest lets pile up: a peer gone mad
_PASSED = (frames.DATA, frames.EOF, frames.CREDIT, frames.SHUT)

PauseHook = Callable[[bool], Awaitable[None]]


class Relay:
    """Serves launchers for one guest. Hooks are called in the event loop's thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.on_first: Callable[[], None] = lambda: None
        self.on_last_closed: Callable[[], None] = lambda: None
        self.on_pause: PauseHook | None = None
        self.on_phase: Callable[[str, float], str] = lambda name, seconds: ""  # returns what to tell the launcher
        self.on_become: Callable[[int, dict[str, Any]], None] | None = None
        self.first = FirstCommand(lambda name, seconds: self.on_phase(name, seconds))
        self.channel: GuestChannel | None = None
        self.launchers: list[Launcher] = []  # oldest first
        self.met = asyncio.Event()  # a launcher has connected, now or earlier
        self._error: WnodesError | None = None
        self._said: list[str] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.streams: dict[int, Launcher] = {}  # by the guest's stream id

    async def start(self) -> None:
        """Listen, with mode 0600. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listener.bind(self.path)
        finally:
            os.umask(old)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: Launcher(self), sock=listener)

    async def stop(self) -> None:
        """Close the door and every launcher; a launcher that still waits for its command hears why."""
        if self._server is not None:
            self._server.close()
        for launcher in list(self.launchers):
            launcher.fail(self._error or ChannelLost("the VM was ended"))
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def announce(self, text: str) -> None:
        """Tell every launcher that waits what is going on."""
        self._said.append(text)
        for launcher in self.launchers:
            launcher.note({"progress": text})

    def fail(self, error: WnodesError) -> None:
        """No guest (any more): every launcher, now and later, ends with this error."""
        if self._error is None:
            self._error = error
        for launcher in list(self.launchers):
            launcher.fail(self._error)

    def ready(self, channel: GuestChannel) -> None:
        """The guest answers: let the commands in. When the channel is lost it is for the caller to ``fail`` us."""
        self.channel = channel
        channel.on_open = self._guest_opens
        for launcher in list(self.launchers):
            launcher.go()

    # called by launchers

    def joined(self, launcher: Launcher) -> None:
        """A launcher has connected."""
        self.met.set()
        self.launchers.append(launcher)
        if self._error is not None:
            launcher.fail(self._error)
            return
        if self.channel is not None:
            launcher.go()
        else:
            for text in self._said[-1:]:
                launcher.note({"progress": text})
        if len(self.launchers) == 1:
            self.on_first()

    def left(self, launcher: Launcher) -> None:
        """A launcher has gone: its commands are hung up."""
        if launcher not in self.launchers:
            return
        self.launchers.remove(launcher)
        for stream in [number for number, owner in self.streams.items() if owner is launcher]:
            self._hang_up(stream)
        if not self.launchers:
            self.on_last_closed()

    def _hang_up(self, stream: int) -> None:
        del self.streams[stream]
        if self.channel is not None:
            self.channel.drop_stream(stream)
            ending = b'{"code":1,"error":"the launcher has gone"}' if stream & frames.GUEST_BIT else b'{"close":true}'
            kind = frames.EXIT if stream & frames.GUEST_BIT else frames.CONTROL
            self.channel.send(kind, 0, stream, ending)

    def pause(self, paused: bool) -> None:
        """A launcher was told to stop (or go on): the whole VM does."""
        if self.on_pause is not None:
            task = asyncio.ensure_future(self.on_pause(paused))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # called by the channel

    def _guest_opens(self, kind: int, sub: int, stream: int, payload: bytes) -> None:
        """A command of the guest wants a command of the host: its own launcher decides."""
        request = decode(payload)
        if request.get("verb") == "become" and self.on_become:
            self.on_become(stream, request)
            return
        text = str(request.get("exec", ""))
        owner = self.streams.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 11 else None
        owner = owner or next(iter(self.launchers), None)
        assert self.channel is not None
        if stream in self.streams:
            raise frames.ProtocolError(f"stream {stream} opened twice")
        if owner is None or len(self.streams) > 4096:
            self.channel.send(frames.EXIT, 0, stream, b'{"code":1,"error":"nobody on the host to run it"}')
            return
        self.streams[stream] = owner
        owner.adopt(stream, payload)


class Launcher(asyncio.BufferedProtocol):
    """One connected launcher; its streams, rewritten."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._parser = frames.Parser(frames.MAX_TO_GUEST)
        self._transport: asyncio.Transport | None = None
        self._early: list[tuple[int, int, int, bytes]] = []
        self._early_size = 0
        self._to_guest: dict[int, int] = {}
        self._names: dict[int, int] = {}  # the launcher's stream id by the guest's
        self._granted: dict[tuple[int, int], int] = {}  # by guest stream and sub: what the guest may send

    # asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let in the job's user and root, nobody else."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", peer)[1] not in (0, os.getuid()):
            transport.abort()
            return
        self._relay.joined(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._parser.space()

    def buffer_updated(self, nbytes: int) -> None:
        """Frames of the launcher."""
        try:
            for kind, sub, stream, payload in self._parser.received(nbytes):
                self._take(kind, sub, stream, payload)
        except frames.ProtocolError as error:
            self.fail(WnodesError(f"launcher: {error}"))

    def eof_received(self) -> None:
        """The launcher has gone; returning None closes our side too."""

    def connection_lost(self, error: Exception | None) -> None:
        """The launcher has gone, killed perhaps."""
        self._relay.left(self)

    # from the launcher

    def _take(self, kind: int, sub: int, stream: int, payload: Any) -> None:
        if kind == frames.CONTROL and stream == 0:
            self._relay.pause(bool(decode(payload).get("pause")))
            return
        channel = self._relay.channel
        if channel is None:
            self._early_size += len(payload)
            if self._early_size > _MAX_BACKLOG:
                raise frames.ProtocolError("too much before the guest is ready")
            self._early.append((kind, sub, stream, bytes(payload)))
            return
        if channel.unsent > _MAX_BACKLOG:
            raise frames.ProtocolError("the guest takes no more")
        if kind == frames.OPEN:
            inner = channel.new_stream(self._from_guest)
            self._to_guest[stream] = inner
            self._relay.streams[inner] = self
            window = int(decode(payload).get("window", frames.WINDOW))
            self._granted.update({(inner, 1): window, (inner, 2): window})
            self._names[inner] = stream
            self._relay.first.opened(inner)
            channel.send(kind, sub, inner, payload)
            return
        inner = stream if stream & frames.GUEST_BIT else self._to_guest.get(stream, 0)
        if self._relay.streams.get(inner) is not self:
            return  # the command is over
        if kind == frames.CREDIT:
            self._grant(inner, sub, frames.amount_of(bytes(payload)))
        channel.send(kind, sub, inner, payload)
        if kind == frames.EXIT:
            self._over(inner)

    def _grant(self, inner: int, sub: int, amount: int) -> None:
        total = self._granted.get((inner, sub), 0) + amount
        if total > frames.MAX_CREDIT:
            raise frames.ProtocolError(f"credit of {total} bytes: want at most {frames.MAX_CREDIT}")
        self._granted[inner, sub] = total

    # from the guest

    def _from_guest(self, kind: int, sub: int, inner: int, payload: Any) -> None:
        ending: dict[str, Any] = {}
        if kind == frames.DATA:
            left = self._granted.get((inner, sub), 0) - len(payload)
            if left < 0:
                raise frames.ProtocolError(f"{-left} bytes more than were granted")
            self._granted[inner, sub] = left
        elif kind in (frames.EXIT, frames.REPLY) or (kind == frames.CONTROL and inner & frames.GUEST_BIT):
            ending = decode(payload)
        elif kind not in _PASSED:
            raise frames.ProtocolError(f"frame of type {kind} from the guest")
        if said := self._relay.first.saw(kind, inner, lambda: ending.get("error")):
            self.note({"progress": said})
        self._send(kind, sub, self._names.get(inner, inner), payload)
        if kind == frames.EXIT:
            self._over(inner)

    def adopt(self, stream: int, payload: bytes) -> None:
        """Take a stream that the guest has opened."""
        assert self._relay.channel is not None
        self._relay.channel.adopt_stream(stream, self._from_guest)
        self._names[stream] = stream
        self._send(frames.OPEN, 0, stream, payload)

    def _over(self, inner: int) -> None:
        self._relay.streams.pop(inner, None)
        if self._relay.channel is not None:
            self._relay.channel.drop_stream(inner)
        outer = self._names.pop(inner, 0)
        self._to_guest.pop(outer, None)
        for sub in (0, 1, 2):
            self._granted.pop((inner, sub), None)

    # to the launcher

    def _send(self, kind: int, sub: int, stream: int, payload: bytes | memoryview) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(frames.HEADER.pack(kind, sub, 0, stream, len(payload)))
        if len(payload):
            self._transport.write(payload)
        if self._transport.get_write_buffer_size() > 2 * _MAX_BACKLOG:
            self._transport.abort()

    def note(self, note: dict[str, Any]) -> None:
        """Tell the launcher something of the lease."""
        self._send(frames.NOTE, 0, 0, json.dumps(note).encode())

    def fail(self, error: WnodesError) -> None:
        """End the launcher with an error."""
        self.note({"error": error.to_dict()})
        if self._transport is not None:
            self._transport.close()
        self._relay.left(self)

    def go(self) -> None:
        """The guest is there: pass on what waited."""
        self.note({"ready": True})
        early, self._early = self._early, []
        for kind, sub, stream, payload in early:
            self._take(kind, sub, stream, payload)
