"""System calls that gateways need and Python does not know: mounts by open folders, roots and filters of their own.

Numbers and layouts are those of ``linux/mount.h``, ``linux/filter.h``, ``linux/seccomp.h`` and ``asm/unistd.h``. Each
raises OSError with the kernel's words.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Sequence
from typing import Any

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same on every architecture; Linux 5.12
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000  # linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # MOUNT_ATTR_*
_MNT_DETACH = 2
_NEWNS = 0x20000  # linux/sched.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24  # linux/prctl.h
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER = 47, 3
SYS_PTRACE = 19  # linux/capability.h
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "s390x": 217}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int | bytes) -> int:
    """A system call by its number; libc may not know it."""
    words = [each if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *words))


def checked(result: int) -> int:
    """What a function of ``libc`` returned."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def clone(path: str | bytes, *, below: bool = False) -> int:
    """A mount of our own, nowhere yet, of what is at a path; ``below``: and of all that is mounted beneath."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if below else 0)
    return call(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def clone_open(folder: int) -> int:
    """The same of an open folder, whatever its path leads to by now."""
    return call(_OPEN_TREE, folder, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC)


def seal(tree: int, *, read_only: bool, below: bool = False) -> None:
    """Have such a mount give neither devices nor rights, and let nobody write if so."""
    attributes = _NOSUID | _NODEV | (_RDONLY if read_only else 0)
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: to set, to clear, propagation, userns
    call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | (_AT_RECURSIVE if below else 0), wanted, len(wanted))


def attach(tree: int, path: str) -> None:
    """Mount it at a path; ``tree`` is closed."""
    call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def unshare_mounts() -> None:
    """Have a mount namespace of our own, a copy of the one before."""
    checked(libc.unshare(_NEWNS))


def change_root(folder: str) -> None:
    """Take a mount for our root and let go of the one before (pivot_root(2), 'pivot_root(".", ".")')."""
    os.chdir(folder)
    call(_PIVOT_ROOT[os.uname().machine], b".", b".")
    checked(libc.umount2(b".", _MNT_DETACH))  # what was our root lies over the new one
    os.chdir("/")


def die_with_parent() -> None:
    """Be killed when the thread that made us ends; who changes its credentials has to ask again."""
    checked(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))


def hide() -> None:
    """Let no process without CAP_SYS_PTRACE over us see our memory or open files; exec(2) ends that."""
    checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def forgo(capability: int) -> None:
    """Have what we become by exec(2) never hold a capability, unless it is root."""
    checked(libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))
    checked(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, capability, 0, 0))


def keep_capabilities(kept: Sequence[int]) -> None:
    """Hold no others from now on (capset(2)); what is started then may."""
    head, bits = struct.pack("=Ii", 0x20080522, 0), sum(1 << number for number in kept)
    checked(libc.capset(head, struct.pack("=IIIIII", bits, bits, 0, 0, 0, 0)))


def filter_of(number: int, verdict: int) -> tuple[bytes, Any]:
    """A seccomp filter (struct sock_fprog) that gives a verdict on one system call and lets all others be.

    With the memory that it names, to be kept until it is loaded.
    """
    load, equal, give = 0x20, 0x15, 0x06
    arch = AUDIT_ARCH[os.uname().machine]
    steps = ((load, 0, 0, 4), (equal, 0, 3, arch), (load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, verdict))
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in (*steps, (give, 0, 0, _ALLOW))))
    return struct.pack("@HP", len(steps) + 1, ctypes.addressof(text)), text
