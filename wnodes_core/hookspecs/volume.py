"""Hooks for a lease's own block storage, which root makes on the node, and for disks of running VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Disk, Vm
    from wnodes_core.volumes import Volume


@hookspec(firstresult=True)
def wnodes_volume_attach(volume: Volume) -> bool | None:
    """Called in wnodesd, as root, before the VM starts: make the volume and the node to open it by.

    It is empty: no byte of an earlier user can be read from it. Called again for a volume that exists, it
    makes a new one in its place. No file system: the job's user makes that.

    :param volume: everything was decided before and is in the journal.
    :returns: True when the user can open ``volume.node``, None if such volumes are another provider's.
    :raises HostBusy: there is no room for it.
    :raises HostError: the node's storage is not as the settings say.
    """


@hookspec(firstresult=True)
def wnodes_volume_detach(volume: Volume) -> bool | None:
    """Called to remove a volume and its node; idempotent, also for one that was only half made.

    What has the name and is not ``volume.owner``'s stays.

    :param volume: as given to ``wnodes_volume_attach``; that call may never have returned.
    :returns: True when nothing of it is left, None if it is another provider's.
    :raises TransientError: it is still in use; this is tried again.
    """


@hookspec
def wnodes_volume_list(group: str, owner: str, folder: str) -> list[Volume]:
    """Called by the sweeper: what there is of this node's volumes and nodes, whether a lease has them or not.

    :param group: where the settings have volumes made.
    :param owner: whose they are.
    :param folder: where the nodes are.
    """


@hookspec(firstresult=True)
def wnodes_disk_plug(vm: Vm, disk: Disk, fd: int) -> bool | None:
    """Called once a clone answers, to give the running VM one more disk; its template has none.

    :param vm: as given to ``wnodes_vm_clone``, in the same process.
    :param disk: what ``wnodes_disk_create`` made.
    :param fd: the same, open to read and write: the VM may be another user's than the disk.
    :returns: True when it is on the guest's bus, None if this backend plugs no such disk.
    :raises TransientError: it could not be plugged.
    """
