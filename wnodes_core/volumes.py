"""The noun of block devices that root makes for a lease: a logical volume, known to the job's user by a node.

Frozen, typed, no I/O. Units stand in the names (``size_mib``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PREFIX = "wnodes-"


@dataclass(frozen=True)
class Volume:
    """One lease's scratch on the node's own block storage, with all that was decided before it was made.

    ``owner`` names the wnodesd whose it is: several nodes may see one volume group. ``node`` is the device
    node that ``uid`` and ``gid`` are to open it by. ``pool`` '' = no thin pool. Of a pool no more than
    ``promise_percent`` of its size is promised, and nothing while it is used beyond ``full_percent``.
    """

    lease: str
    group: str
    owner: str
    node: str
    pool: str = ""
    size_mib: int = 0
    uid: int = 0
    gid: int = 0
    promise_percent: int = 100
    full_percent: int = 95

    @property
    def name(self) -> str:
        """Its name in the group."""
        return name_of(self.lease)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Volume:
        """Back from ``to_dict``."""
        return cls(**data)


def name_of(lease: str) -> str:
    """The name of a lease's volume, in signs that LVM takes; without ``_`` it is no name that LVM keeps for itself.

    >>> name_of("slurm-n0-12_3-ab12cd")
    'wnodes-slurm-n0-12-3-ab12cd'
    """
    return PREFIX + re.sub(r"[^A-Za-z0-9.+-]", "-", lease)[:100]
