"""A user's folder as a mount: ``nfs_source FOLDER`` mounts it at a folder of root's; its orders come on stdin.

Root follows no path of a user's. The source is opened by a process with the job's own rights, and what is mounted is
the open folder, so that nothing depends on what the path leads to later.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
from contextlib import suppress
from typing import Any

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture; Linux 5.12
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000  # linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4  # linux/mount.h
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # MOUNT_ATTR_*, the same
_OPEN_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Mount it; what goes wrong is said on stderr."""
    try:
        attach(share(json.loads(sys.stdin.buffer.read())), sys.argv[1])
    except OSError as error:
        sys.exit(str(error))


def share(told: dict[str, Any]) -> int:
    """The user's folder as a mount that is nowhere yet. Raises OSError."""
    folder = _opened_as_user(told)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            raise NotADirectoryError(f"source {told['source']!r}: want a folder")
        tree = call(_OPEN_TREE, folder, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC)
    finally:
        os.close(folder)
    attributes = _NOSUID | _NODEV | (_RDONLY if told["read_only"] else 0)
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: to set, to clear, propagation, userns
    call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted))
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


def clone(path: str) -> int:
    """A mount of our own, nowhere yet, that shows what is at a path. Raises OSError."""
    return call(_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def attach(tree: int, path: str) -> None:
    """Mount it at a path. Raises OSError."""
    call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def call(number: int, *arguments: int | bytes) -> int:
    """A system call by its number. Raises OSError."""
    words = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    return checked(_libc.syscall(ctypes.c_long(number), *words))


def checked(result: int) -> int:
    """The result of one that libc knows. Raises OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}")
    return int(result)


if __name__ == "__main__":
    main()
