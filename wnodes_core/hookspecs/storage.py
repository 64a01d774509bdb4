"""Hooks for mounts: what the user asks for becomes an attachment, served by a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Mount


@hookspec(firstresult=True)
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any]) -> dict[str, Any] | None:
    """Called in the lease's keeper, as the job's user, once the guest answers.

    :param mount: host folder and guest folder.
    :param socket_path: Unix socket of a virtio-serial port reserved for this mount.
    :param guest: facts the guest's agent told (``kernel``, ``sshfs``, ``machine``) and ``port``.
    :returns: ``{"provider", "process": {pid, started}, "guest": [...], "notice"}``: the gateway
        that now serves it on the host, the commands that the agent runs as guest root to mount
        it (arguments of ``GuestChannel.run``), words for the user or ''; None to leave it to
        another provider.
    :raises MountDenied: the source is not a folder the user can read.
    """


@hookspec(firstresult=True)
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Called to end a gateway; idempotent, and never blocked by a guest that hangs.

    :param attachment: what ``wnodes_mount_attach`` returned.
    :returns: True when it is gone, None if it is another provider's.
    """
