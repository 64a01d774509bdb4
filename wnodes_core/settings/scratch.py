"""The section ``scratch``: where a lease's own disk lies on this node, and what kind of thing it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from wnodes_core.model import Disk
from wnodes_core.settings import values
from wnodes_core.settings.fields import setting

SERIAL = "scratch"  # by which a guest knows the disk
_LVM_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,126}\Z")  # lvm(8), VALID NAMES


def lvm_name(text: str) -> str:
    """The name of a volume group or of a thin pool."""
    if not _LVM_NAME.match(text) or text in (".", ".."):
        raise ValueError("want a name as LVM has them: letters, digits, '+', '_', '.' and '-', not first")
    return text


@dataclass(frozen=True)
class ScratchSettings:
    """A disk of the lease's own, empty at its start and gone at its end (``scratch=20G``).

    A file, unless ``volume_group`` is given: then wnodesd makes a logical volume for each lease.
    """

    folder: str = setting(
        "lease",
        "Where its file lies: `lease` (the lease's folder), or a local folder where users may make files (mode 1777).",
        values.folder_or("lease"),
        node_only=True,
    )
    format: str = setting(
        "raw",
        "raw (its room is set aside at the start) or qcow2 (it grows: for file systems that can set nothing aside).",
        values.choice("raw", "qcow2"),
        node_only=True,
    )
    volume_group: str = setting(
        "none", "LVM volume group for a logical volume a lease, in place of a file.", lvm_name, node_only=True
    )
    thin_pool: str = setting(
        "none",
        "Thin pool of that group, whose volumes take what is written. Without one they are plain, and wiped first.",
        lvm_name,
        node_only=True,
    )
    thin_promise_percent: int = setting(
        100,
        "How much of the thin pool's size may be promised to volumes; beyond 100 jobs may find it full.",
        values.whole,
        node_only=True,
    )
    thin_full_percent: int = setting(
        95, "No new volume while data or metadata of the pool is used beyond this.", values.percent, node_only=True
    )
    shown_at: tuple[str, ...] = setting(
        ("/tmp", "/var/tmp", "/scratch"), "The guest's folders that lie on it, writable for everybody in the guest."
    )

    def __post_init__(self) -> None:
        if self.pool and not self.group:
            raise ValueError(f"thin_pool {self.thin_pool!r} without a volume_group")
        if self.group and (self.folder != "lease" or self.format != "raw"):
            raise ValueError("volume_group is in place of a file: give neither folder nor format with it")

    @property
    def group(self) -> str:
        """The volume group; '' where scratch is a file."""
        return "" if self.volume_group == "none" else self.volume_group

    @property
    def pool(self) -> str:
        """The thin pool; '' without one."""
        return "" if self.thin_pool == "none" else self.thin_pool

    def disk_for(self, size_mib: int | None, lease: str, folder: str) -> Disk | None:
        """The file that is to be a lease's scratch; where there are volumes wnodesd names its own in its place."""
        if not size_mib:
            return None
        path = f"{folder}/scratch.{self.format}"
        if self.folder != "lease":  # which all leases share
            path = f"{self.folder}/scratch-{lease}.{self.format}"
        return Disk(path, self.format, serial=SERIAL, size_mib=size_mib)
