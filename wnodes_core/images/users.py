"""Who asks for an image."""

from __future__ import annotations

import grp
import os
import pwd
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class User:
    """Who asks for an image: uid, name and the names of all groups."""

    uid: int
    name: str
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, uid: int) -> User:
        """The user of that uid as this node knows it; a uid without a name is its number."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(uid, str(uid))
        names = []
        for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
            with suppress(KeyError):
                names.append(grp.getgrgid(gid).gr_name)
        return cls(uid, entry.pw_name, tuple(names))

    @classmethod
    def current(cls) -> User:
        """The user we run as."""
        return cls.of(os.geteuid())
