"""Folders of the host in the guest: 9p, a device of the VM that QEMU itself serves.

For guests that know no virtiofs and hosts that have no virtiofsd: there is no gateway, for QEMU opens the folder, as
the job's user whose process it is. What the guest's root may do there is what that user may: QEMU looks each part of a
path up beneath the folder and follows no link. Contract of both ends: QEMU's ``-fsdev local`` (qemu(1)), libvirt's
``<filesystem>`` and the kernel's Documentation/filesystems/9p.rst. A VM that has such a device is booted, not cloned.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from wnodes_core.api import Mount, hookimpl
from wnodes_core.errors import HostError, NoProvider
from wnodes_core.storage import devices

wnodes_api = 1
NAME = "9p"

# As the backend looks for it. EL builds its own without 9p.
EMULATORS = (f"/usr/bin/qemu-system-{os.uname().machine}", "/usr/libexec/qemu-kvm")
# msize: what the kernel's virtio transport takes at most (net/9p/trans_virtio.c: 125 pages); it cuts more off.
# mmap: nothing is cached but pages that are mapped, so that what the host writes is seen at once, and a program may
# map a file to write (no other cache lets it without believing old content). nosuid, nodev: guest root could leave
# them out, and would gain nothing on the host: QEMU has no right to make a device or to give a file away.
_OPTIONS = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,nosuid,nodev"


def find_emulator() -> str:
    """Path of the QEMU that VMs of this host run in. Raises HostError where there is none."""
    for path in EMULATORS:
        if os.access(path, os.X_OK):
            return path
    raise HostError("no QEMU on this host", hint="install qemu-system-x86")


def serves(emulator: str) -> bool:
    """Whether that QEMU has the device. Asking it costs 60 ms, and a look into the program 5."""
    with open(emulator, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return content.find(b"virtio-9p-pci") >= 0 or content.find(b"virtio-9p-ccw") >= 0


@hookimpl
def wnodes_mount_usable() -> dict[str, str]:
    """Whether QEMU may have 9p; told from its place, for each lease with mounts asks."""
    problem = ""
    try:
        if "libexec" in Path(find_emulator()).parts:
            problem = "EL's QEMU has no 9p"
    except HostError as error:
        problem = f"{error.message}; {error.hint}"
    return {"provider": NAME, "problem": problem, "needs": "device"}


@hookimpl
def wnodes_mount_equip(
    mount: Mount, index: int, folder: str, guest: dict[str, Any], provider: str, memory: int | None
) -> dict[str, Any] | None:
    """Have QEMU serve the folder. There is nothing to start."""
    if provider != NAME:
        return None
    devices.check(NAME, mount, guest)
    if not serves(find_emulator()):
        raise NoProvider(f"mount {mount}: this host's QEMU has no 9p")
    device = devices.filesystem(NAME, mount, index, mount.source)
    return {"provider": NAME, "process": None, "filesystem": device, "notice": ""}


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Say how the guest mounts the device."""
    if provider != NAME:
        return None
    return devices.attachment(NAME, mount, guest, _OPTIONS)


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """Nothing runs and nothing lies about: QEMU's end was the device's."""
    return True if attachment.get("provider") == NAME else None
