"""The noun of exports: a folder of the host that root offers to one lease's VM over its way to the node.

Frozen, typed, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Export:
    """One mount of a lease, with all that was decided before anything was made.

    ``source`` is a path of the user's: only a process with the user's own rights (``uid``, ``gid``, ``groups``) may
    follow it. ``node`` and ``local`` are the node's address and the VM's on the way between the two; ``port`` is
    the TCP port of the node that the port's rules leave to that VM. ``folder`` is root's own, for whatever the
    provider keeps; it may not exist.
    """

    lease: str
    index: int
    provider: str
    source: str
    read_only: bool
    uid: int
    gid: int
    groups: tuple[int, ...]
    node: str
    local: str
    port: int
    folder: str

    @property
    def name(self) -> str:
        """What tells it from all others of the node."""
        return f"{self.lease}-{self.index}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Export:
        """Back from ``to_dict``, also through JSON."""
        return cls(**{**data, "groups": tuple(data["groups"])})
