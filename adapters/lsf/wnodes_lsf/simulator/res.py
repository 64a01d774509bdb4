"""res: the job's root process (T). Runs the job file as its child and ends as that ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import sys
import termios
from typing import Any, NoReturn

from wnodes_lsf.simulator import nios

# It lives through what is meant for the job (T: only SIGKILL and SIGSTOP of the group reach it).
SHRUGGED_OFF = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP),
    *(signal.SIGXCPU, signal.SIGQUIT, signal.SIGCONT),
)


def main() -> NoReturn:
    """``res JOBFILE MODE [FD]``: MODE is batch, pipes (bsub -I) or pty (bsub -Is)."""
    job_file, mode = sys.argv[1:3]
    for number in SHRUGGED_OFF:
        signal.signal(number, signal.SIG_IGN)
    if mode == "batch":
        status = os.waitpid(_start(job_file), 0)[1]
    else:
        status = _interactive(job_file, mode, socket.socket(fileno=int(sys.argv[3])))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _start(job_file: str, stdio: tuple[int, int, int] = (0, 1, 2), *, terminal: bool = False) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in SHRUGGED_OFF:
            # SIGHUP is ignored in jobs (T).
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if terminal:
            os.setsid()
            fcntl.ioctl(stdio[0], termios.TIOCSCTTY, 0)
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        os.closerange(3, 256)
        os.execv("/bin/sh", ["/bin/sh", job_file])
    finally:
        os._exit(127)


def _interactive(job_file: str, mode: str, sock: socket.socket) -> int:
    if mode == "pty":
        master, slave = pty.openpty()
        pid = _start(job_file, (slave, slave, slave), terminal=True)
        os.close(slave)
        with open(f"{job_file}.pgid", "w") as file:  # its session is its own: sbatchd signals that group too
            file.write(str(pid))
        return _relay(sock, pid, master, {master: nios.STDOUT}, terminal=True)
    pipes = [os.pipe() for _ in range(3)]
    pid = _start(job_file, (pipes[0][0], pipes[1][1], pipes[2][1]))
    for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(fd)
    return _relay(sock, pid, pipes[0][1], {pipes[1][0]: nios.STDOUT, pipes[2][0]: nios.STDERR}, terminal=False)


def _relay(sock: socket.socket, pid: int, stdin: int, outputs: dict[int, int], *, terminal: bool) -> int:
    open_ends = {stdin}
    listening = True
    while outputs:
        sources: list[Any] = [sock] * listening + list(outputs)
        ready = select.select(sources, [], [], 0.2)[0]
        if sock in ready:
            listening = _from_user(sock, pid, stdin, open_ends, terminal)
        for fd in [each for each in ready if each in outputs]:
            if not _to_user(sock, fd, outputs[fd]):
                del outputs[fd]
    return os.waitpid(pid, 0)[1]


def _to_user(sock: socket.socket, fd: int, kind: int) -> bool:
    try:
        data = os.read(fd, 65536)
    except OSError:  # EIO: the terminal's last user has gone
        data = b""
    with contextlib.suppress(OSError):
        nios.send(sock, kind, data)
    return bool(data)


def _from_user(sock: socket.socket, pid: int, stdin: int, open_ends: set[int], terminal: bool) -> bool:
    frame = nios.receive(sock)
    if frame is None:
        return False
    kind, data = frame
    if kind == nios.WINSIZE and terminal:
        fcntl.ioctl(stdin, termios.TIOCSWINSZ, data)
    elif kind == nios.SIGNAL:
        os.killpg(pid if terminal else os.getpgrp(), struct.unpack("=I", data)[0])
    elif kind == nios.STDIN and stdin in open_ends:
        _feed(stdin, data or (b"\4" if terminal else b""), open_ends)
    return True


def _feed(stdin: int, data: bytes, open_ends: set[int]) -> None:
    if not data:
        open_ends.discard(stdin)
        os.close(stdin)
        return
    with contextlib.suppress(OSError):
        nios.write_all(stdin, data)
