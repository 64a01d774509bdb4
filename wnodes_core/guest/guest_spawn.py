"""Starting a command by posix_spawn(3), without a copy of this process: under TCG half of fork's time.

The library can set neither user nor folder, so that this process takes them on for the moment;
it has one thread. What this cannot do (a terminal, resource limits) is left to ``guest_exec``.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import signal
from typing import Any

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_NEVER_IGNORED = (signal.SIGKILL, signal.SIGSTOP)
_IDENTITY = ("uid", "gid", "groups")


def suits(args: dict[str, Any], theirs: list[int]) -> bool:
    """Whether this way can do all that ``args`` want."""
    if not hasattr(os, "posix_spawn") or args.get("tty") or args.get("rlimits"):  # Python 3.8
        return False
    if any(0 <= fd <= 2 for fd in theirs) or signal.SIGCHLD in args.get("ignored", ()):
        return False
    return os.getuid() == 0 or not any(name in args for name in _IDENTITY)


def spawn(args: dict[str, Any], theirs: list[int]) -> int:
    """Start it with ``theirs`` as fds 0-2 (-1: closed): its pid.

    Raises OSError with what could not be done (a missing program, folder).
    """
    ignored = [number for number in args.get("ignored", ()) if number not in _NEVER_IGNORED]
    actions = [
        (os.POSIX_SPAWN_DUP2, fd, sub) if fd >= 0 else (os.POSIX_SPAWN_CLOSE, sub) for sub, fd in enumerate(theirs)
    ]
    how = {
        "file_actions": actions,
        "setsid": True,
        "setsigmask": [],
        "setsigdef": [number for number in _IGNORED_BY_PYTHON if number not in ignored],
    }
    old = [(number, signal.signal(number, signal.SIG_IGN)) for number in ignored]
    mask = os.umask(int(args.get("umask", 0o022)))
    home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    groups = os.getgroups()
    try:
        _become(args)
        os.chdir(args["cwd"])
        return _start(args, how)
    finally:
        _become_root_again(args, groups)
        os.fchdir(home)
        os.close(home)
        os.umask(mask)
        for number, handler in old:
            signal.signal(number, handler)


def _become(args: dict[str, Any]) -> None:
    """Take on the ids but for the saved ones, which exec(2) replaces in the command."""
    if "groups" in args and os.getuid() == 0:
        os.setgroups(args["groups"])
    if args.get("gid", -1) >= 0:
        os.setresgid(args["gid"], args["gid"], 0)
    if args.get("uid", -1) >= 0:
        os.setresuid(args["uid"], args["uid"], 0)


def _become_root_again(args: dict[str, Any], groups: list[int]) -> None:
    if any(name in args for name in _IDENTITY):
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def _start(args: dict[str, Any], how: dict[str, Any]) -> int:
    """Find the program as execvpe(3) does."""
    argv, environ = args["argv"], args["environ"]
    name = args.get("program") or argv[0]
    if "/" in name:
        return os.posix_spawn(name, argv, environ, **how)
    number = 2
    for folder in environ.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":"):
        path = (folder or ".") + "/" + name
        if not os.access(path, os.F_OK):
            continue
        try:
            return os.posix_spawn(path, argv, environ, **how)
        except OSError as error:
            if error.errno not in (2, 20):  # ENOENT, ENOTDIR: the next folder may have it
                number = error.errno or 5
    raise OSError(number, os.strerror(number), name)
