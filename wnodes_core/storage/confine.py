"""Confining a gateway to the folder it serves, with Landlock: no root needed, no way back.

The rules are made in the caller; between fork and exec only two system calls remain, so this
is safe in a process with threads. Numbers and layouts are those of ``linux/landlock.h`` and the
kernel's Documentation/userspace-api/landlock.rst.

Landlock governs opening, making, removing and renaming files. It does not govern stat, chmod,
chown and utime, so names and modes outside stay reachable with the user's own rights.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_PR_SET_NO_NEW_PRIVS = 38
_RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE = 1 << 13, 1 << 14
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE

READ = READ_FILE | READ_DIR
READ_AND_RUN = READ | EXECUTE
ALL_BUT_RUN = (1 << 15) - 1 - EXECUTE  # ABI 3 and before; devices' ioctls (ABI 5) stay denied

# Rights that each ABI knows: bits of files, of TCP, of scopes (signals, abstract sockets).
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
# Before ABI 2 every rename and link between two folders is refused, whatever the rules say,
# which would break ordinary jobs.
_OLDEST_ABI = 2

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The Landlock ABI of the running kernel, 0 where there is none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def usable() -> str:
    """'' if gateways can be confined on this host, else the reason why not."""
    found = abi()
    if found >= _OLDEST_ABI:
        return ""
    if not found:
        return "this kernel has no Landlock, or it is switched off"
    return f"this kernel's Landlock has ABI {found}; {_OLDEST_ABI} or later allows renames between folders"


def _attributes(version: int, *, files_only: bool = False) -> bytes:
    files = (1 << _FILE_BITS[min(version, max(_FILE_BITS))]) - 1
    if version < 4 or files_only:
        return struct.pack("=Q", files)
    tcp = 0b11
    if version < 6:
        return struct.pack("=QQ", files, tcp)
    return struct.pack("=QQQ", files, tcp, 0b11)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"landlock: {os.strerror(number)}")
    return int(result)


def make_ruleset(rules: Sequence[tuple[str, int]], *, files_only: bool = False) -> int:
    """A ruleset that allows each (path, rights) and what lies beneath; a path may be absent.

    Without ``files_only`` it also forbids TCP and signals, as far as the kernel can.
    Returns its file descriptor, for ``restriction``.
    Raises OSError, also where ``usable`` gives a reason.
    """
    version = abi()
    attributes = _attributes(version, files_only=files_only)
    known = struct.unpack_from("=Q", attributes)[0]
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)))
    try:
        for path, rights in rules:
            with suppress(FileNotFoundError, PermissionError):
                _allow(ruleset, path, rights & known)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        beneath = struct.pack("=Qi", rights, fd)
        _checked(_libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), _RULE_PATH_BENEATH, beneath, ctypes.c_uint32(0)))
    finally:
        os.close(fd)


def restriction(ruleset: int) -> Callable[[], None]:
    """What the child calls just before exec: from then on only the ruleset's paths open.

    Raises OSError in the child, which then does not exec.
    """
    prctl, syscall = _libc.prctl, _libc.syscall

    def restrict() -> None:
        _checked(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))

    return restrict
