"""Hooks for mounts: what the user asks for becomes an attachment, served by a gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.model import Mount


@hookspec
def wnodes_mount_usable() -> dict[str, str]:
    """Called by ``wnodes doctor`` for what can serve mounts on this host.

    :returns: ``{"provider": name, "problem": why not here, or ""}``, one a provider.
    """


@hookspec(firstresult=True)
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Called in the lease's keeper, as the job's user, once the guest answers.

    It is called for one provider after the other, in the site's order (``storage: {order: …}``), until
    one serves the mount. What raises has left nothing behind.

    :param mount: host folder and guest folder.
    :param socket_path: Unix socket of a virtio-serial port reserved for this mount.
    :param guest: facts the guest's agent told (``kernel``, ``sshfs``, ``machine``) and ``port``.
    :param provider: whose turn it is; a plug-in that ignores it is asked first, for every mount.
    :returns: ``{"provider", "process": {pid, started}, "guest": [...], "notice"}``: the gateway
        that now serves it on the host, the commands that the agent runs as guest root to mount
        it (arguments of ``GuestChannel.run``), words for the user or ''; None to leave it to
        another provider.
    :raises MountDenied: the source is not a folder the user can read.
    :raises NoProvider: this provider cannot serve it to this guest.
    :raises HostError: it could, if this host had what it needs.
    """


@hookspec(firstresult=True)
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Called to end a gateway; idempotent, and never blocked by a guest or a gateway that hangs.

    :param attachment: what ``wnodes_mount_attach`` returned.
    :returns: True when it is gone, None if it is another provider's.
    """
