"""A guest without a guest: the real agent as a local process, the real relay in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import wnodes_core.guest
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.guest.relay import Relay

GUEST = Path(wnodes_core.guest.__file__).parent

# What the bootstrap does once it has its port, with a root folder for the agent's files.
PEER = """
import importlib.machinery, importlib.util, socket, sys
loader = importlib.machinery.SourceFileLoader("boot", sys.argv[1])
boot = importlib.util.module_from_spec(importlib.util.spec_from_loader("boot", loader))
loader.exec_module(boot)
fd = int(sys.argv[2])
nonce, source = boot.receive(fd, 1)
exec(compile(source, "agent", "exec"), {"PORT_FD": fd, "NONCE": nonce, "ROOT": sys.argv[3]})
"""

# What a launcher is: one process, its own stdio, ends as the command did.
LAUNCHER = """
import json, sys
from wnodes_core.guest import client
closed = client.reserve_stdio()
wish = json.loads(sys.argv[2])
client.die_like(client.run(sys.argv[1], client.Command(**wish), closed=closed, progress=client.show_progress))
"""


def load_bootstrap() -> Any:
    """guest_bootstrap as a module."""
    loader = importlib.machinery.SourceFileLoader("guest_bootstrap", str(GUEST / "guest_bootstrap"))
    spec = importlib.util.spec_from_loader("guest_bootstrap", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    old, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = old
    return module


class Kit:
    """One fake VM: QEMU's socket, the agent behind it, a relay before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        (self.root / "etc").mkdir(parents=True)
        self.socket = str(folder / "keeper.sock")
        self.paused: list[bool] = []
        self._qemu = socket.socket(socket.AF_UNIX)
        self._qemu.bind(str(folder / "agent.sock"))
        self._qemu.listen(1)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._ports: list[socket.socket] = []
        self.agent: subprocess.Popen[bytes] | None = None
        self.channel: Any = None
        self.relay: Any = None

    def call(self, coroutine: Any, timeout_s: float = 20) -> Any:
        """Run a coroutine in the keeper's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def do(self, function: Any, *args: Any) -> Any:
        """Run a function in the keeper's thread."""

        async def run() -> Any:
            return function(*args)

        return self.call(run())

    def serve(self) -> None:
        """Start the relay alone."""

        async def start() -> Relay:
            relay = Relay(self.socket)

            async def pause(paused: bool) -> None:
                self.paused.append(paused)

            relay.on_pause = pause
            await relay.start()
            return relay

        self.relay = self.call(start())

    def boot(self) -> None:
        """Connect the channel and start the agent."""
        waiting = asyncio.run_coroutine_threadsafe(
            GuestChannel.connect(self.folder / "agent.sock", timeout_s=20), self.loop
        )
        port, _ = self._qemu.accept()
        self.agent = subprocess.Popen(
            [sys.executable, "-I", "-c", PEER, str(GUEST / "guest_bootstrap"), str(port.fileno()), str(self.root)],
            pass_fds=[port.fileno()],
        )
        port.close()
        self.channel = waiting.result(20)

    def start(self) -> Kit:
        """Relay, agent, channel."""
        self.serve()
        self.boot()
        self.do(self._ready)
        return self

    def _ready(self) -> None:
        """What the keeper does: let the commands in, and end them when the channel is lost."""
        self.channel.lost.add_done_callback(lambda lost: self.relay.fail(lost.result()))
        self.relay.ready(self.channel)

    def fake_guest(self) -> socket.socket:
        """A channel to a guest that the test plays itself, past its greeting."""
        waiting = asyncio.run_coroutine_threadsafe(
            GuestChannel.connect(self.folder / "agent.sock", timeout_s=20), self.loop
        )
        port, _ = self._qemu.accept()
        self._ports.append(port)
        boot = load_bootstrap()
        port.setblocking(False)
        nonce, _ = boot.receive(port.fileno(), 1)
        port.setblocking(True)
        port.settimeout(10)
        port.sendall(b"WNODES-AGENT %s\n" % nonce.encode())
        self.fake_hello(port)
        self.channel = waiting.result(20)
        self.do(self._ready)
        return port

    @staticmethod
    def fake_hello(port: socket.socket) -> None:
        """Answer ``hello``, which is stream 1."""
        from wnodes_core.guest import frames

        kind, _, stream, _ = read_frame(port)
        assert (kind, stream) == (frames.OPEN, 1)
        port.sendall(frames.pack(frames.REPLY, 0, 1, b'{"ok":{}}'))

    def argv(self, *argv: str, **wish: Any) -> list[str]:
        """The argv of a launcher for a command."""
        wish = {"argv": argv, "cwd": str(self.folder), "environ": {"PATH": os.environ["PATH"]}, **wish}
        return [sys.executable, "-c", LAUNCHER, self.socket, json.dumps(wish)]

    def run(self, *argv: str, stdin: Any = b"", **wish: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end through a launcher."""
        return subprocess.run(self.argv(*argv, **wish), input=stdin, capture_output=True, timeout=30)

    def popen(self, *argv: str, wish: dict[str, Any] | None = None, **kwargs: Any) -> subprocess.Popen[bytes]:
        """Start a launcher."""
        return subprocess.Popen(self.argv(*argv, **(wish or {})), **kwargs)

    def close(self) -> None:
        """End everything."""
        if self.channel is not None:
            self.do(self.channel.close)
        if self.relay is not None:
            self.call(self.relay.stop())
        if self.agent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.agent.wait(5)
            self.agent.kill()
            self.agent.wait()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()
        for port in [self._qemu, *self._ports]:
            port.close()


def read_frame(port: socket.socket) -> tuple[int, int, int, bytes]:
    """One whole frame."""
    from wnodes_core.guest import frames

    head = port.recv(frames.HEAD, socket.MSG_WAITALL)
    kind, sub, _, stream, length = frames.HEADER.unpack(head)
    return kind, sub, stream, port.recv(length, socket.MSG_WAITALL) if length else b""
