"""Hooks for mounts: what the user asks for becomes an attachment, served by a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.exports import Export
    from wnodes_core.model import Mount


@hookspec
def wnodes_mount_usable() -> dict[str, str]:
    """Called by ``wnodes doctor`` for what can serve mounts on this host.

    Also by whoever plans a VM, for what a provider needs of it.

    :returns: ``{"provider": name, "problem": why not here, or "", "needs": …}``, one a provider. ``needs`` is ''
        for a virtio-serial port, which every VM has for each mount; ``device`` for what must be in the VM
        when it starts (``wnodes_mount_equip``), so that it cannot be a clone; ``plug`` for what can also be
        plugged into a running clone; ``network`` for a NIC; ``export``
        for a NIC and something that wnodesd makes as root. Such a one may add ``port``: the number of the TCP port
        of the node that it serves all VMs on, if not one of its own for each mount.
    """


@hookspec(firstresult=True)
def wnodes_mount_equip(
    mount: Mount, index: int, folder: str, guest: dict[str, Any], provider: str, memory: int | None
) -> dict[str, Any] | None:
    """Called in the lease's keeper, as the job's user: the device that the VM must have for this mount.

    Before a VM is booted, and once a clone runs. Only a provider that ``needs`` a device, or one to be plugged, is
    asked, one after the other in the site's order, and none that stands behind one that needs none.

    :param mount: host folder and guest folder.
    :param index: the mount's number in the lease.
    :param folder: the lease's own, for sockets.
    :param guest: what the image's catalogue entry says of the guest.
    :param provider: whose turn it is.
    :param memory: an open file of a clone's memory where its hypervisor has it (/proc/PID/mem, proc(5)), for what
        cannot be shared with it; None before a boot.
    :returns: ``{"provider", "process": {pid, started} or None, "filesystem": {"kind", "source", "tag",
        "read_only"}, "notice"}``; None to leave it to another provider. ``wnodes_mount_attach`` gets it back
        as ``guest["equipped"]``, ``wnodes_mount_detach`` undoes it.
    :raises MountDenied: the source is not a folder the user can read.
    :raises NoProvider: this provider cannot serve it.
    :raises HostError: it could, if this host had what it needs.
    """


@hookspec(firstresult=True)
def wnodes_mount_export(export: Export) -> dict[str, Any] | None:
    """Called in wnodesd, as root, once a lease's port is made: offer a folder to its VM, and to nobody else.

    Asked once a mount, of the first provider in the site's order that ``needs`` an export, if none stands before it
    that needs nothing. Whatever uid the VM claims, ``export.uid`` and ``export.gid`` are what the host sees.

    :param export: everything was decided before and is in the journal. Its source is a path of the user's.
    :returns: JSON values that ``wnodes_mount_attach`` gets as ``guest["export"]``; None if it is another provider's.
    :raises NoProvider: it cannot be exported; the next provider in the order serves.
    :raises HostError: it could, if this host had what it needs. The same is done.
    """


@hookspec(firstresult=True)
def wnodes_mount_unexport(export: Export) -> bool | None:
    """Called to take an export back; idempotent, also for one that was only half made, and never blocked by one
    that hangs.

    :param export: as given to ``wnodes_mount_export``; that call may never have returned.
    :returns: True when nothing of it is left, None if it is another provider's.
    :raises HostError: something of it is left; this is tried again.
    """


@hookspec(firstresult=True)
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Called in the lease's keeper, as the job's user, once the guest answers.

    It is called for one provider after the other, in the site's order (``storage: {order: …}``), until
    one serves the mount. What raises has left nothing behind.

    :param mount: host folder and guest folder.
    :param socket_path: Unix socket of a virtio-serial port reserved for this mount.
    :param guest: facts the guest's agent told (``kernel``, ``sshfs``, ``machine``); ``port``; ``equipped``, what
        ``wnodes_mount_equip`` made; ``nic`` as ``Nic.to_dict``; ``export``, what wnodesd exports for it, or
        ``{"problem": why it does not}``; None for what there is not.
    :param provider: whose turn it is; a plug-in that ignores it is asked first, for every mount.
    :returns: ``{"provider", "process": {pid, started} or None, "guest": [...], "notice"}``: the gateway
        that now serves it on the host, if it is one of its own; the commands that the agent runs as guest
        root to mount it (arguments of ``GuestChannel.run``); words for the user or ''; None to leave it to
        another provider.
    :raises MountDenied: the source is not a folder the user can read.
    :raises NoProvider: this provider cannot serve it to this guest.
    :raises HostError: it could, if this host had what it needs.
    """


@hookspec(firstresult=True)
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Called to end a gateway; idempotent, and never blocked by a guest or a gateway that hangs.

    :param attachment: what ``wnodes_mount_attach`` or ``wnodes_mount_equip`` returned.
    :returns: True when it is gone, None if it is another provider's.
    """
