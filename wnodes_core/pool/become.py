"""Leaving root for good."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from wnodes_core.errors import HostError

_PR_SET_DUMPABLE = 4  # linux/prctl.h
_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Be this user, with no way back; checked by what the kernel then says.

    A caller that is this user already only checks. Raises HostError; the caller must end then.
    """
    if not uid:
        raise HostError(f"uid {uid}: want another than root's")
    try:
        if os.geteuid() == 0:
            os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
    except OSError as error:
        raise HostError(f"cannot become uid {uid}: {error}") from error
    _check(uid, gid, groups)
    # The kernel keeps a process that changed its user from all others' eyes; what we hold is this user's.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _check(uid: int, gid: int, groups: Sequence[int]) -> None:
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or set(os.getgroups()) - {gid, *groups}:
        raise HostError(f"want uid {uid}, gid {gid}; have {os.getresuid()}, {os.getresgid()}, {os.getgroups()}")
    with open("/proc/self/status", encoding="ascii") as file:
        held = [line.strip() for line in file if line.startswith(_SETS) and int(line.split()[1], 16)]
    if held:
        raise HostError(f"uid {uid} still holds capabilities: {held}")
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise HostError(f"uid {uid} can become root again")
