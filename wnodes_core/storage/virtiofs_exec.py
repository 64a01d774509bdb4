"""Becomes virtiofsd in namespaces of its own: ``virtiofs_exec STARTER LOG ro|rw SOURCE SERVER [ARGUMENT…]``.

Called by unshare(1) in a fresh user and mount namespace. There SOURCE is mounted at ``PLACE``, so that the kernel
itself says no to writing (``ro``), to devices and to setuid programs, whatever is asked of the server; and no name
of the user's is an argument of it, where a comma would begin its next option. Of all else the server sees what it is
made of, the host's programs and libraries, and its own open files, in a root of their own. It is bound to die with
STARTER, whose child it is: before a hypervisor has called, it would wait for ever. What goes wrong until then is said
on stderr, where STARTER listens, and a NUL if nothing did; the server's own stderr is the fd LOG.
"""

from __future__ import annotations

import os
import sys

from wnodes_core.storage import calls

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_FILTER, _RET_ERRNO_0 = 22, 38, 2, 0x00050000  # linux/prctl.h, seccomp.h
_MS_NOSUID, _MS_NODEV, _MS_BIND_REC = 2, 4, 0x1000 | 0x4000  # linux/mount.h
_SETGROUPS = {"x86_64": 116, "aarch64": 159}  # asm/unistd.h
# What a server is made of and reads, public on every node. Not all of /proc: /proc/PID/root of the user's other
# processes leads out. Its own open files it opens by their names.
_SHOWN = ("usr", "lib", "lib64", "etc/ld.so.cache", "proc/self/fd", "proc/self/mountinfo", "proc/sys/fs")

PLACE = "/tmp"  # in our own mount namespace: every host has it, and the server needs none


def main(argv: list[str]) -> None:
    """Never returns but by an OSError or SystemExit."""
    starter, log, mode, source, *server = argv
    program = shut_in(source, read_only=mode == "ro", server=server[0])
    calls.die_with_parent()
    if os.getppid() != int(starter):  # it has gone already
        sys.exit("virtiofs: nobody is left to serve")
    os.write(2, b"\0")
    os.dup2(int(log), 2)
    os.close(int(log))
    os.execve(program, server, dict(os.environ))


def shut_in(source: str, *, read_only: bool, server: str) -> int:
    """Have a root of our own with SOURCE at ``PLACE``; the server's program as an open file. Raises OSError."""
    tree = calls.clone(source, below=True)
    calls.seal(tree, read_only=read_only, below=True)
    program = os.open(server, os.O_RDONLY | os.O_CLOEXEC)
    _leave_root()
    calls.attach(tree, PLACE)
    _keep_groups()
    return program


def _leave_root() -> None:
    """Have a root with ``_SHOWN`` and an empty ``PLACE``, and nothing else of the host's. Raises OSError."""
    _empty_place()
    for name in (*_SHOWN, PLACE[1:]):
        place, there = f"{PLACE}/{name}", f"/{name}"
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(there):  # /lib, where it is a part of /usr
            os.symlink(os.readlink(there), place)
        elif os.path.isdir(there):
            os.mkdir(place)
        elif os.path.exists(there):
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        if name in _SHOWN and os.path.exists(there) and not os.path.islink(there):
            calls.checked(calls.libc.mount(there.encode(), place.encode(), None, _MS_BIND_REC, None))
    calls.change_root(PLACE)


def _empty_place() -> None:
    calls.checked(calls.libc.mount(b"tmpfs", PLACE.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=755"))


def leave_all() -> None:
    """Have an empty root, in a mount namespace of our own. Raises OSError."""
    calls.unshare_mounts()
    _empty_place()
    calls.change_root(PLACE)


def _keep_groups() -> None:
    """Have setgroups(2) do nothing and say that it did.

    virtiofsd drops its further groups, for it is meant to be root (CVE-2022-0358), and ends where it may not, as
    here: nobody without rights may drop a group. The job's groups are its own, and its files may hang on them.
    """
    program, kept = calls.filter_of(_SETGROUPS[os.uname().machine], _RET_ERRNO_0)
    calls.checked(calls.libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    calls.checked(calls.libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0))
    del kept  # until now the filter lay in it


if __name__ == "__main__":
    main(sys.argv[1:])
