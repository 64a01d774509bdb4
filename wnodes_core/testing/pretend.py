"""VMs without a hypervisor, as a plug-in for tutorials and tests of a whole site: no KVM, no QEMU, a second a job.

Name it in an entry point of the group ``wnodes.plugins`` (docs/tutorial.md does); a plug-in wins over the
built-in libvirt. The "guest" is the real agent in a process of the job's user, on the host's own files: every
mount is there already. It isolates nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wnodes_core.api import Disk, Mount, errors, hookimpl
from wnodes_core.backends.fake import (
    wnodes_vm_list,
    wnodes_vm_pause,
    wnodes_vm_probe,
    wnodes_vm_start,
    wnodes_vm_stop,
)

__all__ = ["wnodes_vm_list", "wnodes_vm_pause", "wnodes_vm_probe", "wnodes_vm_start", "wnodes_vm_stop"]

wnodes_api = 1


@hookimpl
def wnodes_disk_create(disk: Disk) -> bool:
    """An empty file: nobody boots from it."""
    Path(disk.path).touch()
    return True


@hookimpl
def wnodes_disk_delete(disk: Disk) -> bool:
    """Remove it."""
    Path(disk.path).unlink(missing_ok=True)
    return True


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any]) -> dict[str, Any]:
    """Nothing to do for a folder that is seen at its own path."""
    if not os.path.isdir(mount.source) or mount.source != mount.target:
        raise errors.MountDenied(f"mount {mount}: without a hypervisor a folder is seen at its own path only")
    return {"provider": "pretend", "process": {"pid": 0, "started": 0}, "guest": [], "notice": ""}


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Nothing was made."""
    return True if attachment.get("provider") == "pretend" else None
