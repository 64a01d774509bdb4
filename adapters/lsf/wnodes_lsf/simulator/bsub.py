"""bsub: options, esubs, submission, and for -I the user's terminal. Runs as the user."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
import tty
from typing import Any

from wnodes_lsf.simulator import esubs, nios, wire
from wnodes_lsf.simulator.conf import Conf
from wnodes_lsf.simulator.options import FLAGS, VALUED

REFUSED = 255


def parse(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options by parameter name, and the words of the command."""
    options: dict[str, str] = {}
    words = list(argv)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word in FLAGS:
            options |= FLAGS[word]
        elif word in VALUED and words:
            value = words.pop(0)
            options[VALUED[word]] = _minutes(value) if word == "-W" else value
        else:
            raise SystemExit(f"{word}: Illegal option. Job not submitted.")
    return options, words


def _minutes(text: str) -> str:
    hours, _, minutes = text.rpartition(":")
    return str(int(hours or 0) * 60 + int(minutes))


def flattened(script: str) -> str:
    """A script as LSB_SUB_COMMAND_LINE shows it: line ends become ``;`` (T: lossy)."""
    return ";".join(line for line in script.split("\n") if line.strip())


def embedded(script: str) -> dict[str, str]:
    """Options of the ``#BSUB`` lines (D)."""
    import shlex

    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#BSUB"):
            found |= parse(shlex.split(line[5:]))[0]
    return found


def main() -> int:
    """``bsub [OPTION]… [COMMAND]``, or ``bsub < SCRIPT``."""
    conf = Conf.read()
    options, words = parse(sys.argv[1:])
    script = None
    if not words:
        script = sys.stdin.buffer.read().decode(errors="surrogateescape")
        options = embedded(script) | options
    command = " ".join(words) if words else flattened(script or "")
    outcome = esubs.run_all(conf, "bsub", options | {"COMMAND_LINE": command}, dict(os.environ))
    if outcome.refused:
        print("Request aborted by esub. Job not submitted.", file=sys.stderr)
        return REFUSED
    changed = outcome.options.pop("COMMAND_LINE")
    if script is not None and changed != command:
        script = None  # the esub replaced the script by a command
    message = {
        **{"op": "submit", "options": outcome.options, "environ": outcome.environ, "cwd": os.getcwd()},
        **{"command": changed, "script": script, "data": outcome.data, "interactive": "INTERACTIVE" in outcome.options},
    }
    try:
        return _submit(conf, message)
    except (wire.Refused, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED


def _submit(conf: Conf, message: dict[str, Any]) -> int:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            fds = [theirs.fileno()] if message["interactive"] else []
            answer = wire.ask(conf.socket, message, fds)
        print(f"Job <{answer['id']}> is submitted to queue <{answer['queue']}>.", flush=True)
        if not message["interactive"]:
            return 0
        print("<<Waiting for dispatch ...>>", file=sys.stderr, flush=True)
        _converse(ours, bool(message["options"].get("PTY")))
    return _exit_code(conf, answer["id"])


def _exit_code(conf: Conf, job_id: int) -> int:
    """The job's own exit code (M)."""
    question = {"op": "jobs", "specs": [str(job_id)], "user": "all", "all": True}
    for _ in range(600):
        job = wire.ask(conf.socket, question)["jobs"][0]
        if job["stat"] in ("DONE", "EXIT"):
            return int(job["exit_code"] or 0)
        time.sleep(0.05)
    return REFUSED


def _converse(sock: socket.socket, terminal: bool) -> None:
    """Be the job's terminal until it lets go of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, frame: nios.send(sock, nios.SIGNAL, struct.pack("=I", got)))
    old = None
    if terminal and os.isatty(0):
        old = termios.tcgetattr(0)
        tty.setraw(0)
        nios.send(sock, nios.WINSIZE, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    try:
        _relay(sock)
    finally:
        if old:
            termios.tcsetattr(0, termios.TCSADRAIN, old)


def _relay(sock: socket.socket) -> None:
    sources: list[Any] = [sock, 0]
    while True:
        ready = select.select(sources, [], [])[0]
        if 0 in ready and not _typed(sock):
            sources.remove(0)
        if sock in ready:
            frame = nios.receive(sock)
            if frame is None:
                return
            nios.write_all(2 if frame[0] == nios.STDERR else 1, frame[1])


def _typed(sock: socket.socket) -> bool:
    data = os.read(0, 65536)
    with contextlib.suppress(OSError):
        nios.send(sock, nios.STDIN, data)
    return bool(data)
