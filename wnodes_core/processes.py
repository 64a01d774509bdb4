"""The process table, read from /proc: ancestry, and identity that survives pid reuse."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress

from wnodes_core.errors import CommandError
from wnodes_core.model import Process

# A user's argv may be 6 MiB of one-letter words, in a thousand processes: as Python objects that
# is more memory than wnodesd may take. What we look for in one stands at its beginning.
_COMMAND_BYTES = 16 << 10
_COMMAND_WORDS = 512


def read(pid: int, *, command_of_users: bool = True) -> Process | None:
    """The process ``pid`` as it is now, or None if it is gone.

    ``exe`` is '' where we may not look (another user's process, unless we are root). Of a command
    line only the beginning is read. Without ``command_of_users`` only root's have one: a page of a
    user's may lie in a file system of that user's own, which answers the reader when it likes to.
    """
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
        command = b""
        if uid == 0 or command_of_users:
            with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
                command = file.read(_COMMAND_BYTES)
    except OSError:
        return None
    # The second field is "(comm)" and may itself hold blanks and brackets (proc(5)).
    rest = stat[stat.rindex(b")") + 2 :].split()
    exe = ""
    with suppress(OSError):
        exe = os.readlink(f"/proc/{pid}/exe")
    words = tuple(word.decode(errors="replace") for word in command.rstrip(b"\0").split(b"\0", _COMMAND_WORDS))
    return Process(pid, int(rest[1]), uid, int(rest[19]), exe, words)


def environ_of(process: Process, name: str, *, timeout_s: float = 2.0) -> list[str]:
    """Every value that ``name`` has in the environment this process was started with; [] if it cannot be read.

    More than one value means that somebody wrote it by hand. A user can write all of it: it tells
    which job to ask the batch system about, and proves nothing alone. Read by a process of its own,
    because a page of a user's may answer the reader when it likes to.
    """
    from wnodes_core import command  # not for those who only walk the table

    try:
        done = command.run(["cat", f"/proc/{process.pid}/environ"], timeout_s=timeout_s)
    except CommandError:
        return []
    prefix = name.encode() + b"="
    entries = done.stdout.split(b"\0") if alive(process) else []
    return [entry[len(prefix) :].decode(errors="replace") for entry in entries if entry.startswith(prefix)]


def run_by_root(process: Process, name: str) -> bool:
    """Whether root runs this, from a file of root's whose name begins with ``name``.

    The real uid counts: daemons take a user's effective uid for moments, and a set-uid program of
    root's keeps the real uid of the user who started it.
    """
    if not os.path.basename(process.exe).startswith(name):
        return False
    try:
        with open(f"/proc/{process.pid}/status", encoding="utf-8", errors="replace") as file:
            uids = next(line for line in file if line.startswith("Uid:")).split()[1:]
        return uids[0] == "0" and os.stat(f"/proc/{process.pid}/exe").st_uid == 0
    except (OSError, StopIteration):
        return False


def ancestry(pid: int, *, command_of_users: bool = True) -> Iterator[Process]:
    """The process and its parents up to init, nearest first."""
    seen: set[int] = set()
    while pid > 0 and pid not in seen:
        seen.add(pid)
        process = read(pid, command_of_users=command_of_users)
        if process is None:
            return
        yield process
        pid = process.parent


def table(*, command_of_users: bool = True) -> Iterator[Process]:
    """Every process of the machine."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read(int(name), command_of_users=command_of_users)):
            yield process


def alive(process: Process) -> bool:
    """Whether this very process (not a later one with its pid) still runs."""
    try:
        with open(f"/proc/{process.pid}/stat", "rb") as file:
            rest = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return int(rest[19]) == process.started and rest[0] not in (b"Z", b"X")


def open_pidfd(process: Process) -> int | None:
    """A pidfd for exactly this process (readable when it ends), or None if it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if alive(process):
        return fd
    os.close(fd)
    return None


def kill(process: Process, *, wait_s: float = 5.0) -> bool:
    """SIGKILL exactly this process and wait for its end. True when it is gone."""
    fd = open_pidfd(process)
    if fd is None:
        return True
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(wait_s * 1000))
    finally:
        os.close(fd)
