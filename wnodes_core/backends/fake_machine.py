"""The process that plays a fake VM: QEMU on its channels, and its forked child, the guest.

It listens on the channels' sockets, serves one host at a time and drops what the guest says while
nobody listens. A clone's agent port calls at its host instead, once the guest is at rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

AGENT_PORT = "org.wnodes.agent.0"
_NOBODY = 65534
_CUT_AFTER = 64 << 10
_REST_S = 20.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class _Qemu:
    """What QEMU does for the channels: one host at a time each, bytes both ways."""

    def __init__(self, channels: dict[str, str], guest: socket.socket, fault: str) -> None:
        self.guest = guest
        self.cut = fault == "cut-channel"
        self.deaf = False
        self.seen = 0
        self.hosts: dict[str, socket.socket] = {}
        self.listeners: dict[str, socket.socket] = {}
        for name, path in channels.items():
            listener = socket.socket(socket.AF_UNIX)
            with suppress(FileNotFoundError):
                os.unlink(path)  # one of a VM before, as QEMU does it
            listener.bind(path)
            listener.listen(1)
            self.listeners[name] = listener

    def call(self, path: str) -> None:
        """Connect the agent's port to the host that waits there, as a clone does."""
        host = socket.socket(socket.AF_UNIX)
        host.connect(path)
        self.hosts[AGENT_PORT] = host

    def serve(self) -> None:
        """Relay until the guest is gone."""
        while True:
            waiting = [listener for name, listener in self.listeners.items() if name not in self.hosts]
            for ready in select.select([*waiting, *self.hosts.values(), self.guest], [], [])[0]:
                if ready is self.guest and not self._from_guest():
                    return
                if ready in waiting:
                    self._accept(ready)
                elif ready is not self.guest:
                    self._from_host(ready)

    def _accept(self, listener: socket.socket) -> None:
        name = next(n for n, each in self.listeners.items() if each is listener)
        self.hosts[name] = listener.accept()[0]

    def _from_guest(self) -> bool:
        data = self.guest.recv(65536)
        self.seen += len(data)
        host = self.hosts.get(AGENT_PORT)
        if host and self.cut and self.seen > _CUT_AFTER:
            self.hosts.pop(AGENT_PORT).close()
            self.listeners.pop(AGENT_PORT).close()
        elif host:
            with suppress(OSError):
                host.sendall(data)
        return bool(data)

    def _from_host(self, host: socket.socket) -> None:
        name = next((n for n, each in self.hosts.items() if each is host), None)
        if name is None:
            return
        try:
            data = host.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.hosts.pop(name).close()
        elif name == AGENT_PORT and not self.deaf:
            self.guest.sendall(data)


def _guest(port: socket.socket, parent: int, fault: str) -> None:
    """Be the guest: the bootstrap on ``port``. Never returns."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked to die with it
        os._exit(1)
    source = (Path(__file__).parents[1] / "guest/guest_bootstrap").read_text()
    _furnish(Path("guest"))
    os.chdir("guest")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    print("fake guest: booting", file=sys.stderr, flush=True)
    if fault == "slow":
        time.sleep(1)
    elif fault == "panics":
        print("Kernel panic - not syncing: asked for by fault=panics", file=sys.stderr, flush=True)
        os._exit(1)
    elif fault == "never-boots":
        signal.pause()
    scope: dict[str, Any] = {"__name__": "wnodes_bootstrap"}
    exec(compile(source, "guest_bootstrap", "exec"), scope)
    scope["exec"] = _run_agent
    scope["power_off"] = lambda: os._exit(0)  # the bootstrap's own uses sysrq: never on a host
    port.setblocking(False)
    scope["serve"](port.detach())


def _furnish(guest: Path) -> None:
    """The files by which a guest is somebody, as an image has them."""
    boot_id = guest / "proc/sys/kernel/random/boot_id"
    for folder in (boot_id.parent, guest / "etc"):
        folder.mkdir(parents=True, exist_ok=True)
    boot_id.write_text(f"{uuid.uuid4()}\n")
    (guest / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (guest / "etc/hostname").write_text("fake\n")
    if os.getuid() == 0:
        for path in (guest, *guest.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY)


def _rest(guest: socket.socket) -> None:
    """Be the guest's first host: send it the agent and have that come to rest. OSError if the guest is gone."""
    from wnodes_core.guest import bundle, frames
    from wnodes_core.guest.greeting import Greeting

    guest.settimeout(_REST_S)
    greeting, rest = Greeting(), None
    while rest is None:
        answer, rest = greeting.heard(_heard(guest), 0)
        guest.sendall(answer)
    wish = {"verb": "rest", "modules": bundle.rest_modules()}
    guest.sendall(frames.pack(frames.OPEN, 0, 1, json.dumps(wish).encode()))
    data = rest
    while len(data) < frames.HEAD or len(data) < frames.HEAD + frames.HEADER.unpack_from(data)[-1]:
        data += _heard(guest)
    said = json.loads(data[frames.HEAD :])
    if "ok" not in said:
        raise OSError(f"the agent does not come to rest: {said}")
    guest.settimeout(None)


def _heard(guest: socket.socket) -> bytes:
    data = guest.recv(65536)
    if not data:
        raise OSError("the guest has gone")
    return data


def _run_agent(code: Any, scope: dict[str, Any]) -> None:
    """What the bootstrap calls instead of ``exec``: this agent's guest begins in the current folder."""
    scope["ROOT"] = "."
    exec(code, scope)


def main(argv: list[str]) -> int:
    """Entry point: NAME FACTS READY_FD."""
    facts = json.loads(argv[2])
    ready, console, fault = int(argv[3]), facts["console"] or os.devnull, facts["fault"]
    if fault == "dies" or (fault == "clone-dies" and facts["clone"]):
        return 1
    # What QEMU is shielded from by its wrapper, the fake shrugs off too.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    fd = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    host_end, guest_end = socket.socketpair()
    host = facts["channels"].pop(AGENT_PORT) if facts["clone"] else ""
    qemu = _Qemu(facts["channels"], host_end, fault)
    me = os.getpid()
    if os.fork() == 0:
        os.close(ready)
        host_end.close()
        for listener in qemu.listeners.values():
            listener.close()
        try:
            _guest(guest_end, me, "" if host else fault)
        finally:
            os._exit(1)
    guest_end.close()
    if host:
        _rest(host_end)
        qemu.call(host)
        qemu.deaf = fault == "clone-silent"
        if fault == "clone-garbage":
            qemu.hosts[AGENT_PORT].sendall(os.urandom(4096))
    os.write(ready, b"ready")
    os.close(ready)
    qemu.serve()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
