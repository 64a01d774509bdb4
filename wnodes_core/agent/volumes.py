"""The volumes of this node's leases: made before their VMs start and removed after, in wnodesd and nowhere else.

Nothing is remembered but in the leases' journals: what a volume is follows from its lease and the settings.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wnodes_core.agent.leases import Lease
from wnodes_core.errors import TransientError, WnodesError
from wnodes_core.journal import Resource
from wnodes_core.model import Disk
from wnodes_core.settings.scratch import SERIAL, ScratchSettings
from wnodes_core.volumes import Volume, name_of

log = logging.getLogger("wnodesd")
KIND = "volume"  # of the resource in a lease's journal
FOLDER = "/dev/wnodes"  # no node in it outlives a reboot


class Volumes:
    """One a node. All of it blocks."""

    def __init__(
        self, settings: Callable[[], ScratchSettings], hook: Callable[[], Any], state_dir: str, folder: str = FOLDER
    ) -> None:
        self._settings = settings
        self._hook = hook
        self._owner = owner_of(state_dir)
        self._folder = f"{folder}/{self._owner}"

    def attach(self, lease: Lease) -> dict[str, Any]:
        """Make the volume of a lease, journalled: what of it belongs in the plan.

        Anew for a lease that has one: nothing of an attempt before is in it. Raises WnodesError; what was made
        until then the undo removes.
        """
        settings = self._settings()
        if not settings.group or not lease.request.scratch_mib:
            return {}
        volume = Volume(
            lease=lease.id,
            group=settings.group,
            owner=self._owner,
            node=f"{self._folder}/{name_of(lease.id)}",
            pool=settings.pool,
            size_mib=lease.request.scratch_mib,
            uid=lease.job.uid,
            gid=lease.job.gid,
            promise_percent=settings.thin_promise_percent,
            full_percent=settings.thin_full_percent,
        )
        resource = lease.journal.making(KIND, volume.name, **volume.to_dict())
        try:
            if not self._hook().wnodes_volume_attach(volume=volume):
                raise WnodesError(f"scratch: no plug-in makes volumes in {volume.group!r}")
        except OSError as error:
            raise TransientError(f"scratch volume {volume.name}: {error}") from error
        lease.journal.made(resource)
        disk = Disk(volume.node, "raw", serial=SERIAL, size_mib=volume.size_mib, block=True)
        return {"scratch": asdict(disk)}

    def detach(self, resource: Resource) -> None:
        """Undo a volume of a journal; idempotent. Raises WnodesError if something of it is left."""
        volume = Volume.from_dict(resource.data)
        if not self._hook().wnodes_volume_detach(volume=volume):
            raise WnodesError(f"scratch: no plug-in knows how to remove {volume.group}/{volume.name}")

    def sweep(self, leases: Callable[[], Iterable[str]]) -> None:
        """Remove volumes of ours that no lease of this node has; errors are logged, for the next sweep tries again."""
        group = self._settings().group
        if not group:
            return
        try:
            lists = self._hook().wnodes_volume_list(group=group, owner=self._owner, folder=self._folder)
        except (WnodesError, OSError) as error:
            log.error("volumes: %s", error, extra={"event": "stray"})
            return
        known = {name_of(lease) for lease in leases()}  # after the list: a lease is known before it has a volume
        for volume in (each for found in lists for each in found if each.name not in known):
            log.warning("stray volume %s/%s", volume.group, volume.name, extra={"event": "stray"})
            try:
                self._hook().wnodes_volume_detach(volume=volume)
            except (WnodesError, OSError) as error:
                log.error("volume %s: %s", volume.name, error, extra={"event": "stray"})


def owner_of(state_dir: str) -> str:
    """Which wnodesd a volume is of: this machine's, with this folder. Several may see one volume group."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    return hashlib.sha256(f"{machine or socket.gethostname()}\0{state_dir}".encode()).hexdigest()[:12]
