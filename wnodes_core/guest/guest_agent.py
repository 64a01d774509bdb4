"""The guest's agent: root's hands and the job's process, driven by the host over one port.

Sent by the host at connect and run by ``guest_bootstrap`` (see ``bundle``); one thread, one
poll. It keeps no state that outlives the link: when the host goes, every command is ended.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from wnodes_core.guest import (
    frames,
    guest_door,
    guest_ending,
    guest_exec,
    guest_json,
    guest_users,
    poller,
    pump,
)


class Agent:
    """Serves one connected host. ``root`` is '' in a guest and a folder in tests."""

    def __init__(self, port: int, root: str = "") -> None:
        self.link = pump.Link(port, frames.MAX_TO_GUEST)
        self.root = root
        self.lost_s = 60.0
        self.commands: dict[int, guest_exec.Command] = {}
        self.door: guest_door.Door | None = None
        self._rest: Any = None  # until it wakes it does nothing for anybody
        self._bin = ""  # where the host's commands stand in for those of the image
        self._poller = poller.Poller()
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        self.endings = guest_ending.Endings()

    def run(self) -> None:
        """Serve until the host goes."""
        old = signal.signal(signal.SIGCHLD, lambda *_: None)
        old_fd = signal.set_wakeup_fd(self._waker)
        try:
            while True:
                self._turn()
        except (pump.LinkClosed, frames.ProtocolError):
            pass
        finally:
            signal.set_wakeup_fd(old_fd)
            signal.signal(signal.SIGCHLD, old)
            self._abandon()

    def _turn(self) -> None:
        flows = [command.flow for command in self.commands.values()]
        extra = [self._wake] + [command.mount.fd for command in self.commands.values() if command.mount is not None]
        if self.door is not None:
            flows += self.door.flows()
            extra += self.door.fds()
        due = self.endings.due()
        ready = self._poller.wait(self.link, flows, extra, max(0.0, due - time.monotonic()))
        if self.link.fd in ready:
            for kind, sub, stream, payload in self.link.read():
                self._on_frame(kind, sub, stream, payload)
        if self._wake in ready:
            os.read(self._wake, 4096)
            self._reap()
        if self.door is not None:
            for fd in ready:
                if fd not in (self.link.fd, self._wake):
                    self.door.serve(fd, self.link)
        for command in list(self.commands.values()):
            if command.status is not None or command.mount is not None and command.mount.there():
                self._finish(command)
        self.endings.kill_due()

    def _on_frame(self, kind: int, sub: int, stream: int, payload: Any) -> None:
        if kind == frames.OPEN:
            self._request(stream, payload)
        elif stream & frames.GUEST_BIT:
            self._door_frame(kind, sub, stream, payload)
        elif stream in self.commands:
            if kind == frames.CONTROL:
                self._control(self.commands[stream], guest_json.loads(payload))  # type: ignore[arg-type]
            else:
                self.commands[stream].flow.on_frame(kind, sub, payload)

    def _request(self, stream: int, payload: bytes) -> None:
        args: Any = guest_json.loads(payload)
        verb = args.pop("verb", "")
        if verb == "exec" and self._rest is None:
            self._exec(stream, args)
            return
        try:
            method = getattr(self, "verb_" + verb, None)
            if self._rest is not None and verb != "wake":
                raise ValueError("verb %r: the guest is at rest" % verb)
            if method is None:
                raise ValueError("verb %r: this agent has no such verb" % verb)
            answer = {"ok": method(stream, **args)}
        except pump.LinkClosed:
            raise
        except Exception as error:  # noqa: BLE001 - the host is told, the agent lives on
            answer = {"error": "%s: %s" % (type(error).__name__, error)}
        if answer.get("ok", True) is not None:
            self._answer(frames.REPLY, stream, answer)

    def _answer(self, kind: int, stream: int, answer: dict[str, Any]) -> None:
        self.link.send(frames.pack(kind, 0, stream, guest_json.dumps(answer)))

    def _exec(self, stream: int, args: dict[str, Any]) -> None:
        environ = args["environ"]
        environ["WNODES_EXEC"] = str(stream)
        ours = not (args.get("linger") or args.get("stdio_of"))  # no other account's, for which no host command runs
        if self._bin and ours and self._bin not in environ.get("PATH", self._bin).split(":"):
            environ["PATH"] = self._bin + ":" + environ["PATH"]
        try:
            if args.get("stdio_of"):
                args["fds"] = self.door.stdio_of(args["stdio_of"])  # type: ignore[union-attr]
            command = guest_exec.spawn(self.link, stream, args)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or 0
            what = getattr(error, "filename", None) or ""
            text = "%s: %s" % (what, os.strerror(number)) if number else str(error)
            # What a shell answers: 127 for "not found", 126 for "found, but it does not run".
            self._answer(frames.EXIT, stream, {"code": 127 if number == 2 else 126, "error": text, "errno": number})
            return
        self.commands[stream] = command
        if 0 in command.flow.sinks:
            self.link.send(frames.credit(0, stream, frames.STDIN_WINDOW))

    def _control(self, command: guest_exec.Command, order: dict[str, Any]) -> None:
        if "signal" in order:
            command.signal(int(order["signal"]), whole_group=order.get("to") != "leader")
        if "resize" in order:
            command.resize(order["resize"][0], order["resize"][1])
        if "close" in order:
            for source in command.flow.sources.values():
                source.close()
            self.endings.hang_up(command.pid)

    def _reap(self) -> None:
        """Collect every child: as PID 1 the orphans of the whole guest too."""
        by_pid = {command.pid: command for command in self.commands.values()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in by_pid:
                by_pid[pid].status = status

    def _finish(self, command: guest_exec.Command) -> None:
        """Once the leader has ended: send what its pipes still hold, then the ending."""
        for sub, source in command.flow.sources.items():
            while source.open:
                if self.link.busy or not source.ready:
                    return  # the consumer is slow: nothing may be lost, come again
                if command.flow.read(sub) < 0:
                    source.close()  # held open by a background process: no more is waited for
        del self.commands[command.stream]
        self._answer(frames.EXIT, command.stream, command.ending())
        command.close()
        # What it left running goes too, as at the end of an LRMS step; the search for it comes
        # after the answer, and is needless if no process has been born since.
        if command.linger:
            return
        command.signal(signal.SIGKILL, whole_group=True)
        if guest_exec.last_pid() != command.pid:
            self.endings.sweep(command.pid)

    def _door_frame(self, kind: int, sub: int, stream: int, payload: Any) -> None:
        caller = self.door.find(stream) if self.door is not None else None
        if caller is None or self.door is None:
            return
        if kind == frames.EXIT:
            self.door.ended(caller, guest_json.loads(payload))  # type: ignore[arg-type]
        elif caller.flow is not None:
            caller.flow.on_frame(kind, sub, payload)

    def _abandon(self) -> None:
        self.endings.kill_all({command.pid for command in self.commands.values()})
        for command in self.commands.values():
            command.close()
        if self.door is not None:
            self.door.close()
        self.link.close()
        os.close(self._wake)
        os.close(self._waker)

    # The verbs. Each returns its answer, or None to answer later.

    def verb_hello(self, stream: int, lost_s: float = 60.0) -> dict[str, Any]:
        """Facts of this guest; ``lost_s`` is how long it outlives its host (0: for ever)."""
        self.lost_s = lost_s
        return guest_users.facts()

    def verb_ping(self, stream: int) -> dict[str, Any]:
        """Prove that the agent answers."""
        return {"time": time.time()}

    def verb_setup(self, stream: int, **args: Any) -> dict[str, Any]:
        """Host name, clock, groups and user, loopback, reverse door."""
        etc = self.root + "/etc"
        if args.get("user") is not None:
            guest_users.add_user(args["user"], args.get("groups", []), etc)
            guest_users.make_home(args["user"], self.root)
        if not self.root:
            guest_users.loopback_up()
            if args.get("host_name"):
                guest_users.set_host_name(args["host_name"], etc)
            if args.get("clock"):
                guest_users.set_clock(args["clock"])
        if args.get("shim"):
            self._open_door(args["shim"], args.get("commands", []), (args.get("user") or {"uid": 0})["uid"])
        return {}

    def _open_door(self, shim: str, names: list[str], uid: int) -> None:
        folder = self.root + "/usr/lib/wnodes/bin"  # not below /run: systemd guests mount that noexec
        for name in names:
            if "/" in name or name.startswith("."):
                raise ValueError("command %r: want a plain name" % name)
            guest_exec.put_file(folder + "/" + name, shim.encode("utf-8"), 0o755, -1, -1)
            self._bin = folder
        if self.door is None:
            self.door = guest_door.Door(self.root + "/run/wnodes/host.sock", uid)

    def verb_rest(self, stream: int, modules: list[list[str]]) -> dict[str, Any]:
        """Come to rest, to be saved and cloned: who the template is. From here on only ``wake`` is served."""
        if self.commands or self.endings or self.door is not None:
            raise ValueError("rest: commands still run here")
        _learn(modules)
        self._rest = sys.modules["wnodes_core.guest.guest_rest"].Rest(self.root)
        answer: dict[str, Any] = self._rest.begin()
        return answer

    def verb_wake(self, stream: int, **asked: Any) -> dict[str, Any]:
        """Become who the host says before anything of a job runs; who this is now, and its facts."""
        if self._rest is None:
            raise ValueError("wake: this guest is not at rest")
        told: dict[str, Any] = self._rest.end(asked)
        self._rest = None
        return told

    def verb_network(self, stream: int, modules: list[list[str]], **nic: Any) -> dict[str, Any]:
        """Set up the NIC with that MAC; names drivers to load while it is not to be seen."""
        _learn(modules)
        answer: dict[str, Any] = sys.modules["wnodes_core.guest.guest_network"].set_up(nic, self.root)
        return answer

    def verb_write_file(self, stream: int, **file: Any) -> dict[str, Any]:
        """Write one file (``path``, ``content`` in base64, ``mode``, ``uid``, ``gid``)."""
        guest_exec.put_files([file])
        return {}

    def verb_poweroff(self, stream: int) -> dict[str, Any]:
        """Sync and switch the machine off; the answer goes out first."""
        self._answer(frames.REPLY, stream, {"ok": {}})
        os.sync()
        if not self.root:
            with open("/proc/sysrq-trigger", "w") as file:
                file.write("o")
        return None  # type: ignore[return-value]


def _learn(modules: list[list[str]]) -> None:
    """Load what not every guest needs, as it comes with the request that does."""
    for name, text in modules:
        module = sys.modules[name] = type(sys)(name)
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        exec(compile(text, name, "exec"), module.__dict__)


def _yield_to_jobs() -> None:
    """Do not preempt a job that writes: on one vCPU we would be woken for each page, not each pipeful."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # start.py may have hurried us through the guest's boot
        os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    except OSError:
        pass


def serve(port: int, nonce: str, root: str = "") -> float:
    """Run one agent over ``port``; returns how long to wait for the next host, in seconds."""
    os.set_blocking(port, False)
    for number in range(1, 32):
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
    _yield_to_jobs()
    agent = Agent(port, root)
    agent.link.send(b"WNODES-AGENT " + nonce.encode("ascii") + b"\n")
    agent.run()
    return agent.lost_s
