"""Commands that the guest asks us to run on this host: srun, squeue and the like.

Only names on the caller's list run, at the path that the list gives, as the job's own user.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Mapping
from typing import Any

from wnodes_core.guest import frames, pump

# Which site the command talks to is not the guest's to say: such a file may name code to load.
SITE = ("SLURM_CONF", "LSF_ENVDIR", "CONDOR_CONFIG")
# The guest's libraries and modules are not this host's: such variables wait under another name
# until a step that the command starts is back in the guest.
_LOADERS = ("LD_", "PYTHON", "PERL5", "GCONV_PATH", "LOCPATH", "NLSPATH", "GLIBC_TUNABLES", "BASH_ENV")
_NOT_HERE = _LOADERS + SITE
KEPT = "WNODES_GUEST_"


def for_host(environ: Mapping[str, Any]) -> dict[str, str]:
    """A guest's environment as a command of this host gets it."""
    taken = {str(k): str(v) for k, v in environ.items() if not str(k).startswith("WNODES_")}
    return {(KEPT + k if k.startswith(_NOT_HERE) else k): v for k, v in taken.items()}


def for_guest(environ: Mapping[str, str]) -> dict[str, str]:
    """The same environment when a task that such a command started comes back to the guest.

    >>> for_guest(for_host({"LD_PRELOAD": "x.so", "PATH": "/bin"}))
    {'LD_PRELOAD': 'x.so', 'PATH': '/bin'}
    """
    return {k.removeprefix(KEPT): v for k, v in environ.items()}


class HostCommand:
    """One such command: its process, its flow, or the refusal."""

    def __init__(self, link: pump.Link, stream: int) -> None:
        self._link = link
        self._stream = stream
        self._process: Any = None
        self.pidfd = -1
        self.flow: pump.Flow | None = None
        self._over = False

    def refuse(self, code: int, text: str) -> None:
        """Answer without running anything."""
        self._end({"code": code, "error": text})

    def start(self, program: str, request: dict[str, Any]) -> None:
        """Run it, with a terminal if the guest's caller has one; its stdin comes from the guest."""
        from wnodes_core import command  # 10 ms that only such a command pays

        theirs, ours = _terminal(request["tty"]) if request.get("tty") else _pipes()
        # PATH stays: sbatch hands it on to other jobs, and srun looks its command up as it would without a VM.
        site = {name: os.environ[name] for name in SITE if name in os.environ}
        environ = {"PATH": command.PATH, **site, **for_host(request["environ"])}
        argv = [program, *map(str, request["argv"][1:])]
        try:
            stdio = dict(zip(("stdin", "stdout", "stderr"), theirs, strict=True))
            more = {"before_exec": _take_terminal} if request.get("tty") else {}
            self._process = command.spawn(argv, environ=environ, cwd=str(request["cwd"]), **stdio, **more)  # type: ignore[arg-type]
        except BaseException:
            _close(ours.values())
            raise
        finally:
            _close(set(theirs))
        self.pidfd = os.pidfd_open(self._process.pid)
        for fd in ours.values():
            os.set_blocking(fd, False)
        sources = {sub: pump.Source(fd) for sub, fd in ours.items() if sub}
        self.flow = pump.Flow(self._link, self._stream, sources, {0: pump.Sink(ours[0], frames.STDIN_WINDOW)})
        self._link.send(frames.credit(0, self._stream, frames.STDIN_WINDOW))

    def on_frame(self, kind: int, sub: int, payload: Any) -> None:
        """A frame of its stream."""
        if kind == frames.CONTROL and self._process is not None:
            self._kill(signal.SIGTERM)  # the shim in the guest was killed
        elif self.flow is not None:
            self.flow.on_frame(kind, sub, payload)

    def _kill(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def step(self, ready: set[int]) -> bool:
        """Whether it is over, all output sent."""
        if self._over or self.flow is None:
            return self._over
        if self._process.poll() is None:
            return False
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for sub, source in self.flow.sources.items():
            while source.open:
                if self._link.busy or not source.ready:
                    return False
                if self.flow.read(sub) < 0:
                    source.close()
        code = self._process.returncode
        self._end({"signal": -code} if code < 0 else {"code": code})
        return True

    def _end(self, ending: dict[str, Any]) -> None:
        self._over = True
        self._link.send(frames.pack(frames.EXIT, 0, self._stream, json.dumps(ending).encode()))

    def close(self) -> None:
        """Let go; a process that still runs is ended, for nobody reads it any more."""
        if self.flow is not None:
            self.flow.close()
        if self._process is not None:
            self._kill(signal.SIGTERM)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _pipes() -> tuple[list[int], dict[int, int]]:
    """(the command's fds 0-2, our ends by sub)."""
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
    return [pipes[0][0], pipes[1][1], pipes[2][1]], {0: pipes[0][1], 1: pipes[1][0], 2: pipes[2][0]}


def _terminal(size: Any) -> tuple[list[int], dict[int, int]]:
    """The same with a terminal, whose other side is the one in the guest, in raw mode. Raises ValueError."""
    import fcntl  # what only a command at a terminal needs
    import struct
    import termios

    rows, columns = (min(max(int(number), 0), 0xFFFF) for number in size)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return [slave, slave, slave], {0: os.dup(master), 1: master}


def _take_terminal() -> None:
    """In the child, already leader of a session: ^C typed in the guest is to reach it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def start_host_command(link: pump.Link, stream: int, payload: bytes, allowed: Mapping[str, str]) -> HostCommand:
    """Run what the guest asks for if ``allowed`` (name -> absolute path) has it; else refuse."""
    from wnodes_core.errors import CommandError

    host = HostCommand(link, stream)
    try:
        request = json.loads(payload)
        name = os.path.basename(str(request["argv"][0]))
        if name not in allowed:
            host.refuse(126, f"the host runs no {name[:80]!r} for this job")
            return host
        host.start(allowed[name], request)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        host.refuse(125, f"malformed request: {error}")
    except (CommandError, OSError) as error:
        host.refuse(127, str(error))
    return host
