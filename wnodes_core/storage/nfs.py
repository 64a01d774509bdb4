"""Folders of the host in the guest: NFS 4.1 and later, exported by root on the VM's way to its node.

Two servers: the kernel's own where the host has it (``nfs_kernel``), else one nfs-ganesha a mount
(``nfs_ganesha``). In both the host sees the job's user, whoever asks, and answers the one VM. wnodesd makes the
export; here is what keeper and guest do with it: mount(8) with options of nfs(5), without its helper program.
"""

from __future__ import annotations

from typing import Any

from wnodes_core.api import Export, Mount, hookimpl
from wnodes_core.errors import NoProvider
from wnodes_core.storage import nfs_ganesha, nfs_kernel
from wnodes_core.storage.sshfs import check_source

wnodes_api = 1
NAME = "nfs"
# Who gets no answer for 10 s asks twice more, and then it is an error (EIO): a gateway that died is not waited for
# for ever, and a file system of the host's may be away for a moment.
PATIENCE = "soft,timeo=100,retrans=2"
# resvport is the default: a port that in the guest only its root may use.
_OPTIONS = "proto=tcp,sec=sys,nosuid,nodev,acregmax=2,acdirmax=2"
_STAGES = "/run/wnodes/mounts"
_MOUNT_TIMEOUT_S = 60.0


@hookimpl
def wnodes_mount_usable() -> dict[str, str]:
    """Which of the two servers there is."""
    if nfs_kernel.there():
        return {"provider": NAME, "problem": nfs_kernel.problem(), "needs": "export", "port": str(nfs_kernel.PORT)}
    return {"provider": NAME, "problem": nfs_ganesha.problem(), "needs": "export"}


@hookimpl
def wnodes_mount_export(export: Export) -> dict[str, Any] | None:
    """Have the kernel or a ganesha of its own serve it."""
    if export.provider != NAME:
        return None
    if export.port == nfs_kernel.PORT:
        return nfs_kernel.start(export)
    return nfs_ganesha.start(export)


@hookimpl
def wnodes_mount_unexport(export: Export) -> bool | None:
    """Take it back, whichever server had it."""
    if export.provider != NAME:
        return None
    if export.port == nfs_kernel.PORT:
        nfs_kernel.stop(export)
    else:
        nfs_ganesha.stop(export)
    return True


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Say how the guest mounts what wnodesd exports."""
    if provider != NAME:
        return None
    check_source(mount)
    export = guest.get("export") or {}
    if not export.get("port"):
        why = export.get("problem") or "wnodesd exports nothing to this VM: it wants a network of kind bridge or ovs"
        raise NoProvider(f"mount {mount}: {why}")
    if guest.get("nfs") is False:
        raise NoProvider(f"mount {mount}: the guest's kernel has no NFS")
    stage = f"{_STAGES}/{guest['port']}"
    shown = {"stage": stage, "target": mount.target, "read_only": mount.read_only, "read_ahead_kib": 0}
    ends = f"port={export['port']},addr={export['node']},clientaddr={export['local']}"
    # 4.2 needs Linux 3.12 in the guest, and 4.1 3.2: mount(8) with -i asks the kernel, which takes one version only.
    options = f"vers={export.get('version', '4.2')},{ends},{_OPTIONS},{PATIENCE}" + (",ro" if mount.read_only else "")
    argv = ["mount", "-i", "-t", "nfs4", "-o", options, f"{export['node']}:{export['path']}", stage]
    steps = [{"argv": ["modprobe", "nfsv4"]}, {"argv": argv, "mount": shown, "timeout_s": _MOUNT_TIMEOUT_S}]
    return {"provider": NAME, "process": None, "guest": steps, "notice": ""}


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Nothing of it is the keeper's to end."""
    return True if attachment.get("provider") == NAME else None
