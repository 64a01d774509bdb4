"""The host's end of the guest channel: connect, push the agent, ask, and notice its death.

The guest is not trusted: frames are bounded, garbage ends the channel with ChannelLost.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wnodes_core.errors import BootTimeout, ChannelLost
from wnodes_core.guest import bundle, frames, ports
from wnodes_core.guest.answers import MAX_OUTPUT, Collector, Done, decode, encode
from wnodes_core.guest.greeting import Greeting

_MAX_STREAMS = 1 << 30

__all__ = ["Done", "GuestChannel", "Handler", "decode", "encode"]

Handler = Callable[[int, int, int, Any], None]


class GuestChannel(asyncio.BufferedProtocol):
    """A connected guest. ``lost`` is a future that gets the ChannelLost when it dies."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.on_open: Handler | None = None  # streams that the guest opens
        self.lost: asyncio.Future[ChannelLost] = asyncio.get_running_loop().create_future()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = frames.Parser(frames.MAX_TO_HOST, 1 << 20)
        self._transport: asyncio.Transport | None = None
        self._handlers: dict[int, Handler] = {}
        self._next = 0
        self._greeting = Greeting()
        self._space = memoryview(bytearray(64 << 10))

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, timeout_s: float, lost_s: float = 60.0) -> GuestChannel:
        """Connect to QEMU's socket, wait for the guest, push the agent, learn the guest's facts.

        ``lost_s``: the guest powers itself off when its host is away for so long (0: never).

        Raises BootTimeout, ChannelLost.
        """
        deadline = time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        channel: GuestChannel | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while channel is None:
                    try:
                        _, channel = await loop.create_unix_connection(cls, os.fspath(path))
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(0.01)
                bundle.agent_source()  # 40 ms, now while the guest boots and not when it asks
                await channel._ready
        except TimeoutError:
            if channel is not None:
                channel.close()
            raise BootTimeout(f"guest: no answer on its channel within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            if channel is not None:
                channel.close()
            raise
        left = max(1.0, deadline - time.monotonic())
        channel.facts = await channel.request("hello", timeout_s=left, lost_s=lost_s)
        return channel

    @classmethod
    async def resume(
        cls, path: str | os.PathLike[str], *, timeout_s: float, wake: dict[str, Any]
    ) -> tuple[GuestChannel, dict[str, Any]]:
        """Listen on ``path`` for the QEMU of a clone, then ``adopt`` its port. It listens from the first step on.

        QEMU connects here, and not the other way round, so that the guest never sees its port hang up.

        Raises BootTimeout, ChannelLost; OSError if nothing can be bound there.
        """
        deadline = time.monotonic() + timeout_s
        port = await ports.accept(path, timeout_s)
        return await cls.adopt(port, timeout_s=max(0.1, deadline - time.monotonic()), wake=wake)

    @classmethod
    async def adopt(
        cls, port: socket.socket, *, timeout_s: float, wake: dict[str, Any]
    ) -> tuple[GuestChannel, dict[str, Any]]:
        """Wake the guest at rest behind a connected socket: its channel, and who it says it is.

        ``wake`` are the words of the request (``identity.ask``); its ``clock`` becomes the moment of sending.

        Raises BootTimeout if it stays silent, ChannelLost.
        """
        channel = cls.of_running()
        try:
            async with asyncio.timeout(timeout_s):
                port.setblocking(False)
                await asyncio.get_running_loop().connect_accepted_socket(lambda: channel, port)
                wake["clock"] = time.time()
                told = await channel.request("wake", timeout_s=2 * timeout_s, **wake)
        except TimeoutError:
            channel.close()
            raise BootTimeout(f"clone: its agent is silent after wake, for {timeout_s:.1f} s") from None
        except BaseException:
            channel.close()
            if channel._transport is None:
                port.close()
            raise
        channel.facts = {name: value for name, value in told.items() if name not in ("identity", "clock", "took_ms")}
        return channel, told

    @classmethod
    def of_running(cls, streams: int = 0) -> GuestChannel:
        """For a guest whose agent runs and left off at the end of a frame; ``streams`` have been opened already."""
        channel = cls()
        channel._ready.set_result(None)
        channel._next = streams
        return channel

    # asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected to QEMU, which says nothing of the guest."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._parser.space() if self._ready.done() else self._space

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the guest have come."""
        try:
            if self._ready.done():
                self._take(nbytes)
            else:
                self._greet(bytes(self._space[:nbytes]))
        except frames.ProtocolError as error:
            self.fail(f"guest channel: the guest broke the protocol: {error}")

    def eof_received(self) -> None:
        """QEMU closed its end."""
        self.fail("guest channel: the VM has gone")

    def connection_lost(self, error: Exception | None) -> None:
        """The socket broke."""
        self.fail(f"guest channel: {error or 'closed'}")

    # the talk before the agent runs

    def _greet(self, data: bytes) -> None:
        assert self._transport is not None
        answer, rest = self._greeting.heard(data, self.unsent)
        if answer:
            self._transport.write(answer)
        if rest is not None:
            self._ready.set_result(None)
            self._feed(rest)

    def _feed(self, rest: bytes) -> None:
        while rest:
            space = self._parser.space()
            count = min(len(rest), len(space))
            space[:count] = rest[:count]
            self._take(count)
            rest = rest[count:]

    # frames

    def _take(self, count: int) -> None:
        for kind, sub, stream, payload in self._parser.received(count):
            handler = self._handlers.get(stream)
            if handler is not None:
                handler(kind, sub, stream, payload)
            elif stream & frames.GUEST_BIT and kind == frames.OPEN and self.on_open is not None:
                self.on_open(kind, sub, stream, payload)
            elif stream == 0 or stream > self._next and not stream & frames.GUEST_BIT:
                raise frames.ProtocolError(f"frame for stream {stream}, which nobody opened")
            # else: a late frame of a stream that is over

    def send(self, kind: int, sub: int, stream: int, payload: bytes | memoryview = b"") -> None:
        """Send a frame; nothing is sent into a dead channel."""
        if self._transport is None or self.lost.done():
            return
        self._transport.write(frames.HEADER.pack(kind, sub, 0, stream, len(payload)))
        if len(payload):
            self._transport.write(payload)

    @property
    def unsent(self) -> int:
        """Bytes that QEMU has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def new_stream(self, handler: Handler) -> int:
        """A fresh stream id whose frames go to ``handler``."""
        self._next = self._next % _MAX_STREAMS + 1
        self._handlers[self._next] = handler
        return self._next

    def adopt_stream(self, stream: int, handler: Handler) -> None:
        """Take the frames of a stream that the guest opened."""
        self._handlers[stream] = handler

    def drop_stream(self, stream: int) -> None:
        """The stream is over; its late frames are ignored."""
        self._handlers.pop(stream, None)

    # questions

    async def request(self, verb: str, *, timeout_s: float = 30.0, **args: Any) -> dict[str, Any]:
        """Ask the agent and return its answer.

        Raises ChannelLost, also when it does not answer in time or refuses.
        """
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def take(kind: int, sub: int, stream: int, payload: bytes) -> None:
            if kind == frames.REPLY and not answer.done():
                answer.set_result(decode(payload))

        stream = self.new_stream(take)
        try:
            self.send(frames.OPEN, 0, stream, encode({"verb": verb, **args}))
            reply = await self._answer(answer, verb, timeout_s)
        finally:
            self.drop_stream(stream)
        facts = reply.get("ok")
        if not isinstance(facts, dict):
            raise ChannelLost(f"guest agent: {verb}: {str(reply.get('error', 'no answer'))[:500]}")
        return facts

    async def rest(self, *, timeout_s: float = 300.0) -> dict[str, Any]:
        """Bring the guest to rest, for it to be saved: who it is (``identity.of``). It then only wakes, in its clones.

        An ordinary cloud image first boots to its end, which takes what it takes.

        Raises ChannelLost.
        """
        return await self.request("rest", timeout_s=timeout_s, modules=bundle.rest_modules())

    async def _answer(self, answer: asyncio.Future[Any], verb: str, timeout_s: float) -> Any:
        await asyncio.wait({answer, self.lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if self.lost.done():
            raise self.lost.result()
        raise ChannelLost(f"guest agent: {verb}: no answer within {timeout_s:g} s")

    async def run(
        self, argv: Sequence[str], *, timeout_s: float = 30.0, environ: Mapping[str, str] | None = None, **args: Any
    ) -> Done:
        """Run a short command as the guest's root and return what it printed (at most 256 KiB each).

        A daemon that it starts lives on. ``port="NAME"`` makes a virtio-serial port its stdin and
        stdout. With ``mount`` (arguments of ``guest_mounts.Awaited``) it has done its work, and lives on, as
        soon as it has mounted something at ``stage``, which then is shown at ``target``.

        Raises ChannelLost; a command that fails or is missing is an answer, not an error.
        """
        collector = Collector(self.send, asyncio.get_running_loop().create_future())
        stream = self.new_stream(collector.take)
        default = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        wish = {"argv": list(argv), "environ": dict(environ or default), "cwd": "/", "window": MAX_OUTPUT}
        self.send(frames.OPEN, 0, stream, encode({"verb": "exec", **wish, "linger": True, **args}))
        self.send(frames.EOF, 0, stream)
        try:
            ending = await self._answer(collector.ending, argv[0], timeout_s)
        finally:
            if not collector.ending.done():
                self.send(frames.CONTROL, 0, stream, b'{"close":true}')
            self.drop_stream(stream)
        try:
            code = int(ending.get("code", 128 + int(ending.get("signal", 0))))
        except (TypeError, ValueError, OverflowError):
            raise ChannelLost(f"guest agent: ending {str(ending)[:100]}: want a code or a signal") from None
        tail = f"{ending['error']}\n".encode(errors="replace")[:MAX_OUTPUT] if ending.get("error") else b""
        return Done(code, bytes(collector.output[1]), bytes(collector.output[2]) + tail)

    # the end

    def fail(self, message: str) -> None:
        """Declare the channel dead. Idempotent."""
        if not self.lost.done():
            self.lost.set_result(ChannelLost(message, hint="the VM's console.log may say why"))
        if not self._ready.done():
            self._ready.set_exception(self.lost.result())
            self._ready.exception()  # seen: connect() may have given up already
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Hang up; the guest ends every command."""
        self.fail("guest channel: closed by us")
