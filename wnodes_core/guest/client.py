"""The launcher's end: run one command in the guest with this process's own stdio.

Synchronous and light: it stands in front of every task, so start-up time matters.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wnodes_core.errors import ChannelLost, from_dict
from wnodes_core.guest import frames, poller, pump
from wnodes_core.guest.ending import Exit, die_like, reserve_stdio
from wnodes_core.guest.hostcmd import HostCommand, start_host_command
from wnodes_core.guest.terminal import RawTerminal, size

__all__ = ["Command", "Exit", "die_like", "reserve_stdio", "run", "show_progress"]

STREAM = 1
FORWARDED = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "CONT")
_FATAL_EARLY = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM))


@dataclass(frozen=True)
class Command:
    """What to run and how; the guest gets exactly this.

    ``tty``: give it a terminal (ours must be one). ``files``: host files it needs in the guest,
    ``{"path", "mode", "content"}`` with content in base64. ``rlimits``: ``{"nofile": [soft, hard]}``,
    -1 = unlimited. ``leader_only``: signals that go to the command alone, not to its process group.
    ``on_tstp``: ``forward`` (stop the command, then ourselves) or ``pause`` (the whole VM).
    ``host_commands``: what the guest may ask us to run here, name -> absolute path.
    """

    argv: Sequence[str]
    cwd: str
    environ: Mapping[str, str]
    umask: int = 0o022
    uid: int = -1
    gid: int = -1
    groups: Sequence[int] = ()
    tty: bool = False
    files: Sequence[Mapping[str, Any]] = ()
    rlimits: Mapping[str, Sequence[int]] = field(default_factory=dict)
    leader_only: frozenset[int] = frozenset()
    on_tstp: str = "forward"
    host_commands: Mapping[str, str] = field(default_factory=dict)


def run(
    path: str | os.PathLike[str],
    command: Command,
    *,
    closed: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
    connect_timeout_s: float = 10.0,
    gone: Callable[[], bool] = lambda: False,
) -> Exit:
    """Run ``command`` in the guest behind the keeper's socket and return how it ended.

    ``closed`` is what ``reserve_stdio`` returned; ``progress`` gets what goes on before the command says anything;
    ``gone`` says that the keeper is dead, so that there is none to wait for. A
    deadly signal that arrives before the command runs is returned as its ending.

    Raises ChannelLost, or the keeper's own error.
    """
    client = _Client(_connect(os.fspath(path), connect_timeout_s, gone), command, closed, progress)
    try:
        return client.run()
    finally:
        client.close()


def _connect(path: str, timeout_s: float, gone: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            link.close()
            if gone() or time.monotonic() > deadline:
                raise ChannelLost(f"{path}: no keeper answers: {error.strerror}") from error
            time.sleep(0.01)
            continue
        link.setblocking(False)
        return link


class _Client:
    def __init__(
        self, link: socket.socket, command: Command, closed: Sequence[int], progress: Callable[[str], None] | None
    ) -> None:
        self._socket = link
        self._link = pump.Link(link.fileno(), frames.MAX_TO_HOST)
        self._command = command
        self._closed = closed
        self._progress = progress or (lambda text: None)
        self._poller = poller.Poller()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: list[int] = []
        self._old: dict[int, Any] = {}
        self._started = False
        self._early = 0
        self._ending: dict[str, Any] | None = None
        self._host: dict[int, HostCommand] = {}
        self._terminal = RawTerminal(0) if command.tty else None
        self._flow = pump.Flow(self._link, STREAM, *self._stdio())

    def _stdio(self) -> tuple[dict[int, pump.Source], dict[int, pump.Sink]]:
        sources: dict[int, pump.Source] = {}
        sinks: dict[int, pump.Sink] = {}
        for sub in (0, 1, 2):
            if sub in self._closed or (sub == 2 and self._command.tty):
                continue
            fd, whole = poller.private(sub, writing=sub > 0)
            if sub == 0:
                sources[0] = pump.Source(fd)
            else:
                sinks[sub] = pump.Sink(fd, frames.WINDOW, whole=whole)
        return sources, sinks

    def run(self) -> Exit:
        """The whole life of the command."""
        self._catch()
        try:
            self._link.send(frames.pack(frames.OPEN, 0, STREAM, self._request()))
            if 0 in self._closed:
                self._link.send(frames.pack(frames.EOF, 0, STREAM))
            while self._ending is None and not self._early:
                self._turn()
            if self._early:
                return Exit(signal=self._early)
            self._finish_output()
            return self._result()
        except pump.LinkClosed as error:
            raise ChannelLost(f"keeper: {error} while the command ran", hint="the VM or its keeper died") from error
        except frames.ProtocolError as error:
            raise ChannelLost(f"keeper: {error}") from error

    def _request(self) -> bytes:
        wish = self._command
        ignored = [n for n in range(1, 32) if self._old.get(n) == signal.SIG_IGN]
        request: dict[str, Any] = {
            "verb": "exec",
            "argv": list(wish.argv),
            "cwd": wish.cwd,
            "environ": dict(wish.environ),
            "umask": wish.umask,
            "uid": wish.uid,
            "gid": wish.gid,
            "groups": list(wish.groups),
            "files": [dict(file) for file in wish.files],
            "rlimits": {name: list(pair) for name, pair in wish.rlimits.items()},
            "closed": list(self._closed),
            "ignored": ignored,
            "window": frames.WINDOW,
        }
        if self._terminal is not None:
            rows, columns = size(0)
            request["tty"] = {"rows": rows, "cols": columns}
        return json.dumps(request, ensure_ascii=False).encode("utf-8", "backslashreplace")

    # signals

    def _catch(self) -> None:
        """Queue the signals that are forwarded; what we were born ignoring stays ignored."""
        names = FORWARDED + ("TSTP", *(("WINCH",) if self._terminal else ()))
        for number in (int(signal.Signals[f"SIG{name}"]) for name in names):
            self._old[number] = signal.getsignal(number)
            if self._old[number] != signal.SIG_IGN or number in (signal.SIGCONT, signal.SIGTSTP):
                signal.signal(number, lambda number, _: self._signals.append(number))
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def _on_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGWINCH:
                self._control({"resize": size(0)})
            elif number == signal.SIGTSTP:
                self._stop()
            elif not self._started and number in _FATAL_EARLY:
                self._early = number
            elif number == signal.SIGCONT and self._command.on_tstp == "pause":
                self._link.send(frames.pack(frames.CONTROL, 0, 0, b'{"pause":false}'))
            else:
                to = "leader" if number in self._command.leader_only else "group"
                self._control({"signal": int(number), "to": to})

    def _control(self, order: dict[str, Any]) -> None:
        self._link.send(frames.pack(frames.CONTROL, 0, STREAM, json.dumps(order).encode()))

    def _stop(self) -> None:
        """TSTP: pause the VM and live on, or stop the command and then ourselves, as a shell expects."""
        if self._command.on_tstp == "pause":
            self._link.send(frames.pack(frames.CONTROL, 0, 0, b'{"pause":true}'))
            return
        self._control({"signal": int(signal.SIGTSTP), "to": "group"})
        os.kill(os.getpid(), signal.SIGSTOP)

    # frames

    def _turn(self) -> None:
        flows = [self._flow, *(host.flow for host in self._host.values() if host.flow)]
        pids = [host.pidfd for host in self._host.values() if host.pidfd >= 0]
        ready = self._poller.wait(self._link, flows, [self._wake, *pids], 60.0)
        if self._wake in ready:
            os.read(self._wake, 4096)
        self._on_signals()
        if self._link.fd in ready:
            for kind, sub, stream, payload in self._link.read():
                self._on_frame(kind, sub, stream, payload)
        self._half_close()
        for stream in [stream for stream, host in self._host.items() if host.step(ready)]:
            self._host.pop(stream).close()

    def _on_frame(self, kind: int, sub: int, stream: int, payload: Any) -> None:
        if kind == frames.NOTE:
            self._on_note(json.loads(payload))
        elif stream == STREAM and kind == frames.EXIT:
            self._ending = json.loads(payload)
        elif stream == STREAM:
            self._flow.on_frame(kind, sub, payload)
        elif kind == frames.OPEN:
            self._host[stream] = start_host_command(self._link, stream, payload, self._command.host_commands)
        elif stream in self._host:
            self._host[stream].on_frame(kind, sub, payload)

    def _on_note(self, note: dict[str, Any]) -> None:
        if "error" in note:
            raise from_dict(note["error"])
        if "progress" in note:
            self._progress(str(note["progress"]) + "\r" * bool(self._terminal and self._started))  # raw by then
        if note.get("ready"):
            self._started = True
            if self._terminal is not None:
                self._terminal.enter()

    def _half_close(self) -> None:
        """Stdout is closed here too once the command has closed it, so that our reader sees its end.

        Stderr is not: should the VM be lost, that is where we say so.
        """
        sink = self._flow.sinks.get(1)
        if sink is not None and not sink.open and 1 not in self._closed and self._ending is None:
            self._closed = (*self._closed, 1)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, 1)
            os.close(null)

    def _finish_output(self) -> None:
        """The command is over; its last output still goes where it belongs, however slowly."""
        import select

        for sink in self._flow.sinks.values():
            waiter = select.poll()
            waiter.register(sink.fd, select.POLLOUT)
            while sink.open and sink.pending:
                waiter.poll(1000)
                sink.flush()

    def _result(self) -> Exit:
        ending = self._ending or {}
        try:
            code, number = int(ending.get("code", 0)), int(ending.get("signal", 0))
        except (TypeError, ValueError, OverflowError):
            raise ChannelLost(f"guest agent: ending {str(ending)[:100]}: want a code or a signal") from None
        if not (0 <= code <= 255 and 0 <= number <= 64):
            raise ChannelLost(f"guest agent: ending {str(ending)[:100]}: want code 0-255, signal 0-64")
        return Exit(code, number, bool(ending.get("core")), str(ending.get("error", "")))

    def close(self) -> None:
        """Give back terminal, signals, fds."""
        if self._terminal is not None:
            self._terminal.leave()
        signal.set_wakeup_fd(-1)
        for number, old in self._old.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
        for host in self._host.values():
            host.close()
        self._flow.close()
        self._link.close()
        self._socket.close()
        os.close(self._wake)
        os.close(self._waker)


def show_progress(text: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(f"wnodes: {text}\n")
    sys.stderr.flush()
