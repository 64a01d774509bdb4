"""A backend whose VM is a local process: lifecycle tests in milliseconds, tutorials without KVM.

The "guest" is the real bootstrap (and through it the real agent) on one end of a socket pair;
this module plays QEMU in between: it listens on the channels' sockets, serves one host at a time
and drops what the guest says while nobody listens. The guest's own files (users, groups, homes) lie
in ``guest`` beside the VM. Guest code never runs as root here: for root it becomes ``nobody``.

Faults come in the kernel command line: ``fault=never-boots``, ``fault=panics`` (after a hello),
``fault=cut-channel`` (the agent's channel closes after 64 KiB from the guest), ``fault=slow`` (1 s
before the guest starts), ``fault=dies`` (QEMU dies while it starts).
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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.api import Process, Vm, errors, hookimpl
from wnodes_core.tools import alive, kill, read, spawn, table

wnodes_api = 1
AGENT_PORT = "org.wnodes.agent.0"
_MODULE = "wnodes_core.backends.fake"
_NOBODY = 65534
_CUT_AFTER = 64 << 10
_children: dict[int, Any] = {}  # by pid: what this process started and will reap
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@hookimpl
def wnodes_vm_probe(accel: str, folder: str) -> dict[str, Any]:
    """Claim to be TCG; there is no KVM in a fake."""
    if accel == "kvm":
        raise errors.NoKvm("KVM is demanded (accel: kvm), but the fake backend has none")
    return {"accel": "tcg", "notice": "", "qemu": "fake", "libvirt": "fake"}


@hookimpl
def wnodes_vm_start(vm: Vm) -> Process:
    """Start the process that plays the VM; its sockets listen on return."""
    running = next((process for process in _find(vm.name) if process.uid == os.getuid()), None)
    if running:
        return running
    for disk in vm.disks:
        if not os.path.exists(disk.path):
            raise errors.TransientError(f"VM {vm.name}: disk {disk.path} does not exist")
    words = dict(word.partition("=")[::2] for word in (vm.boot.cmdline if vm.boot else "").split())
    facts = {"channels": {c.name: c.path for c in vm.channels}, "console": vm.console, "fault": words.get("fault", "")}
    ready, ready_child = os.pipe()
    # -I, as for every program of ours, so that nothing in the folder can be imported.
    argv = [sys.executable, "-I", "-m", _MODULE, vm.name, json.dumps(facts), str(ready_child)]
    try:
        child = spawn(argv, pass_fds=(ready_child,), cwd=vm.folder)
    finally:
        os.close(ready_child)
    with os.fdopen(ready, "rb") as pipe:
        process = read(child.pid) if pipe.read() else None
    _children[child.pid] = child
    if process is None:
        raise errors.TransientError(f"VM {vm.name}: the fake QEMU ended as it started (exit code {child.wait(10)})")
    return process


@hookimpl
def wnodes_vm_pause(vm: Vm, paused: bool) -> bool:
    """Stop or continue the process and its guest."""
    tree = [each for process in _find(vm.name) for each in _family(process)]
    for process in tree:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP if paused else signal.SIGCONT)
    return bool(tree)


@hookimpl
def wnodes_vm_stop(vm: Vm) -> bool:
    """Kill the process and all that descends from it."""
    gone = True
    for process in _find(vm.name):
        for each in reversed(_family(process)):
            gone = kill(each) and gone
    for pid in [pid for pid, child in _children.items() if child.poll() is not None]:
        del _children[pid]
    return gone


@hookimpl
def wnodes_vm_list() -> list[dict[str, Any]]:
    """The fake VMs of this user; of everybody for root."""
    return [{"name": name, "pid": p.pid, "uid": p.uid, "started": p.started} for name, p in _vms()]


def _find(name: str) -> Iterator[Process]:
    return (process for found, process in _vms() if found == name)


def _vms() -> Iterator[tuple[str, Process]]:
    for process in table():
        ours = process.command[1:4] == ("-I", "-m", _MODULE) and len(process.command) == 7
        if ours and os.getuid() in (0, process.uid) and alive(process) and not _is_guest(process):
            yield process.command[4], process


def _is_guest(process: Process) -> bool:
    """The forked guest has its parent's argv; it is told by that parent."""
    parent = read(process.parent)
    return parent is not None and parent.command == process.command


def _family(process: Process) -> list[Process]:
    """The process and its descendants; the fake QEMU is a subreaper, so none leaves the tree."""
    everybody = list(table())
    found = [process]
    for each in found:
        found += [other for other in everybody if other.parent == each.pid]
    return found


class _Qemu:
    """What QEMU does for the channels: one host at a time each, bytes both ways."""

    def __init__(self, channels: dict[str, str], guest: socket.socket, fault: str) -> None:
        self.guest = guest
        self.cut = fault == "cut-channel"
        self.seen = 0
        self.hosts: dict[str, socket.socket] = {}
        self.listeners: dict[str, socket.socket] = {}
        for name, path in channels.items():
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(1)
            self.listeners[name] = listener

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
        elif name == AGENT_PORT:
            self.guest.sendall(data)


def _guest(port: socket.socket, parent: int, fault: str) -> None:
    """Be the guest: the bootstrap on ``port``. Never returns."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked to die with it
        os._exit(1)
    source = (Path(__file__).parents[1] / "guest/guest_bootstrap").read_text()
    os.makedirs("guest/etc", exist_ok=True)
    if os.getuid() == 0:
        for folder in ("guest", "guest/etc"):
            os.chown(folder, _NOBODY, _NOBODY)
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


def _run_agent(code: Any, scope: dict[str, Any]) -> None:
    """What the bootstrap calls instead of ``exec``: this agent's guest begins in the current folder."""
    scope["ROOT"] = "."
    exec(code, scope)


def main(argv: list[str]) -> int:
    """Entry point of the process that plays the VM: NAME FACTS READY_FD."""
    facts = json.loads(argv[2])
    ready, console, fault = int(argv[3]), facts["console"] or os.devnull, facts["fault"]
    if fault == "dies":
        return 1
    # What QEMU is shielded from by its wrapper, the fake shrugs off too.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    fd = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    host_end, guest_end = socket.socketpair()
    qemu = _Qemu(facts["channels"], host_end, fault)
    me = os.getpid()
    if os.fork() == 0:
        os.close(ready)
        host_end.close()
        for listener in qemu.listeners.values():
            listener.close()
        try:
            _guest(guest_end, me, fault)
        finally:
            os._exit(1)
    guest_end.close()
    os.write(ready, b"ready")
    os.close(ready)
    qemu.serve()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
