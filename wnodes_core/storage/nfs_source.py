"""A user's folder as a mount: ``nfs_source FOLDER`` mounts it at a folder of root's; its orders come on stdin.

Root follows no path of a user's. The source is opened by a process with the job's own rights, and what is mounted is
the open folder, so that nothing depends on what the path leads to later.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import sys
from contextlib import suppress
from typing import Any

from wnodes_core.storage import calls

_OPEN_S = 10.0


def main() -> None:
    """Mount it; what goes wrong is said on stderr."""
    try:
        calls.attach(share(json.loads(sys.stdin.buffer.read())), sys.argv[1])
    except OSError as error:
        sys.exit(str(error))


def share(told: dict[str, Any]) -> int:
    """The user's folder as a mount that is nowhere yet. Raises OSError."""
    folder = _opened_as_user(told)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            raise NotADirectoryError(f"source {told['source']!r}: want a folder")
        tree = calls.clone_open(folder)
    finally:
        os.close(folder)
    calls.seal(tree, read_only=told["read_only"])
    return tree


def _opened_as_user(told: dict[str, Any]) -> int:
    """The source, opened by a process that has the job's rights and no more: the path is the user's. Raises OSError.

    Within a time limit: the path may lead into a file system that does not answer.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _open_as_user(theirs, told)
    theirs.close()
    try:
        if not select.select([ours], [], [], _OPEN_S)[0]:
            raise TimeoutError(f"source {told['source']!r}: its file system did not answer in {_OPEN_S:.0f} s")
        said, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    finally:
        ours.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # one that hangs in the kernel is left to its file system
        os.waitpid(pid, os.WNOHANG)
    if not fds:
        raise PermissionError(f"source {told['source']!r}: {said.decode(errors='replace') or 'nobody opened it'}")
    return fds[0]


def _open_as_user(answer: socket.socket, told: dict[str, Any]) -> None:
    """Never returns."""
    try:
        os.setgroups(told["groups"])
        os.setresgid(*[told["gid"]] * 3)
        os.setresuid(*[told["uid"]] * 3)
        os.close(os.open(told["source"], os.O_RDONLY | os.O_DIRECTORY))  # readable, as every provider wants it
        socket.send_fds(answer, [b"."], [os.open(told["source"], os.O_PATH | os.O_DIRECTORY)])
    except OSError as error:
        answer.send(f"{error.strerror}: want a folder you can read".encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
