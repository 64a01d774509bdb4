"""Becomes virtiofsd in namespaces of its own: ``virtiofs_exec STARTER LOG ro|rw SOURCE SERVER [ARGUMENT…]``.

Called by unshare(1) in a fresh user and mount namespace. There SOURCE is mounted at ``PLACE``, so that the kernel
itself says no to writing (``ro``), to devices and to setuid programs, whatever is asked of the server; and no name
of the user's is an argument of it, where a comma would begin its next option. Of all else the server sees what it is
made of, the host's programs and libraries, and its own open files, in a root of their own. It is bound to die with
STARTER, whose child it is: before a hypervisor has called, it would wait for ever. What goes wrong until then is said
on stderr, where STARTER listens, and a NUL if nothing did; the server's own stderr is the fd LOG.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture; Linux 5.12
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000  # linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4  # linux/mount.h
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # MOUNT_ATTR_*, the same
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_FILTER = 1, 22, 38, 2  # linux/prctl.h
_MS_BIND_REC, _MNT_DETACH = 0x1000 | 0x4000, 2  # linux/mount.h, linux/fs.h
_SETGROUPS = {"x86_64": (0xC000003E, 116), "aarch64": (0xC00000B7, 159)}  # linux/audit.h, asm/unistd.h
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # asm/unistd.h
# What a server is made of and reads, public on every node. Not all of /proc: /proc/PID/root of the user's other
# processes leads out. Its own open files it opens by their names.
_SHOWN = ("usr", "lib", "lib64", "etc/ld.so.cache", "proc/self/fd", "proc/self/mountinfo", "proc/sys/fs")

PLACE = "/tmp"  # in our own mount namespace: every host has it, and the server needs none

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> None:
    """Never returns but by an OSError or SystemExit."""
    starter, log, mode, source, *server = argv
    attributes = _NOSUID | _NODEV | (_RDONLY if mode == "ro" else 0)
    tree = _sealed(source.encode("utf-8", "surrogateescape"), attributes)
    program = os.open(server[0], os.O_RDONLY | os.O_CLOEXEC)
    _leave_root()
    _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, PLACE.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)
    _keep_groups()
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))
    if os.getppid() != int(starter):  # it has gone already
        sys.exit("virtiofs: nobody is left to serve")
    os.write(2, b"\0")
    os.dup2(int(log), 2)
    os.close(int(log))
    os.execve(program, server, dict(os.environ))


def _sealed(folder: bytes, attributes: int) -> int:
    """A tree, not mounted yet, of a folder and all that is mounted below, with these attributes. Raises OSError."""
    tree = _call(_OPEN_TREE, _AT_FDCWD, folder, _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: to set, to clear, propagation, userns
    _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, wanted, len(wanted))
    return tree


def _leave_root() -> None:
    """Have a root with ``_SHOWN`` and an empty ``PLACE``, and nothing else of the host's. Raises OSError."""
    _checked(_libc.mount(b"tmpfs", PLACE.encode(), b"tmpfs", _NOSUID | _NODEV, b"mode=755"))
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
            _checked(_libc.mount(there.encode(), place.encode(), None, _MS_BIND_REC, None))
    os.chdir(PLACE)
    _checked(_libc.syscall(ctypes.c_long(_PIVOT_ROOT[os.uname().machine]), b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))  # the host's root, which lies over ours
    os.chdir("/")


def _keep_groups() -> None:
    """Have setgroups(2) do nothing and say that it did.

    virtiofsd drops its further groups, for it is meant to be root (CVE-2022-0358), and ends where it may not, as
    here: nobody without rights may drop a group. The job's groups are its own, and its files may hang on them.
    """
    arch, number = _SETGROUPS[os.uname().machine]
    load, equal, give, allow = 0x20, 0x15, 0x06, 0x7FFF0000  # linux/filter.h, linux/seccomp.h
    steps = ((load, 0, 0, 4), (equal, 0, 3, arch), (load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, 0x00050000))
    code = b"".join(struct.pack("=HBBI", *step) for step in (*steps, (give, 0, 0, allow)))
    text = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(text))  # struct sock_fprog
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0))


def _call(number: int, *arguments: int | bytes) -> int:
    words = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"virtiofs: {os.strerror(number)}")
    return int(result)


if __name__ == "__main__":
    main(sys.argv[1:])
