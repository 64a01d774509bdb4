"""From a Nic or a Disk to the device that is plugged into a running VM: for libvirt, or for a clone's own QEMU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from wnodes_core.api import Disk, Filesystem, Nic
from wnodes_core.backends.libvirt import objects
from wnodes_core.backends.libvirt.xml import Node

_FUNCTIONS = 8  # of one PCI device
_QUEUE_SIZE = 1024  # as libvirt's own default is for virtiofs
_PCI = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\Z")


def of_nic(nic: Nic) -> Node | None:
    """The device, None for a kind that is not ours. Raises ValueError for a PCI address that is none."""
    mtu = nic.mtu or None
    # No option ROM (rom): no guest boots from this NIC, and the file would have to be there.
    if nic.kind == "user":
        return objects.Interface(type="user", mac=nic.mac)
    if nic.kind == "tap":
        offload = None if nic.offload else False
        return objects.Interface(
            type="ethernet", mac=nic.mac, tap=nic.device, managed=False, checksums=offload, mtu=mtu
        )
    if nic.kind == "pci":
        return _host_device(nic.device)
    return None


def _host_device(address: str) -> Node:
    found = _PCI.match(address)
    if not found:
        raise ValueError(f"PCI address {address!r}: want DOMAIN:BUS:SLOT.FUNCTION as in 0000:3b:02.1")
    domain, bus, slot, function = (f"0x{word}" for word in found.groups())
    return objects.HostDevice(domain=domain, bus=bus, slot=slot, function=function)


def orders(nic: Nic, bus: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of QMP's netdev_add ({} if there is none) and device_add, as libvirt would give them."""
    if nic.kind == "pci":
        return {}, {"driver": "vfio-pci", "id": "hostdev0", "host": nic.device, "bus": bus}
    netdev: dict[str, Any] = {"type": "user", "id": "hostnet0"}
    if nic.kind == "tap":
        netdev = {"type": "tap", "id": "hostnet0", "ifname": nic.device, "script": "no", "downscript": "no"}
    device = {"driver": "virtio-net-pci", "id": "net0", "netdev": "hostnet0", "mac": nic.mac, "romfile": "", "bus": bus}
    more = {**({} if nic.offload else {"csum": False}), **({"host_mtu": nic.mtu} if nic.mtu else {})}
    return netdev, {**device, **more}


def disk_orders(disk: Disk, path: str, bus: str, *, direct_io: bool) -> tuple[dict[str, Any], ...]:
    """Arguments of QMP's blockdev_add, twice, and of device_add, as libvirt would give them."""
    common = {"read-only": False, "cache": {"direct": direct_io, "no-flush": False}, "discard": "ignore"}
    driver = "host_device" if disk.block else "file"
    storage = {"driver": driver, "node-name": f"{disk.serial}-storage", "filename": path, **common}
    layer = {"driver": disk.format, "node-name": f"{disk.serial}-format", "file": storage["node-name"], **common}
    device = {"driver": "virtio-blk-pci", "id": f"{disk.serial}0", "drive": layer["node-name"], "serial": disk.serial}
    # A full host disk is the guest's error, as in domain.py.
    return storage, layer, {**device, "bus": bus, "write-cache": "on", "werror": "report", "rerror": "report"}


def filesystem_orders(filesystems: Sequence[Filesystem], bus: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of QMP's chardev-add and device_add, for each in turn: the functions of one device in one slot.

    The guest is told of them all at once, when function 0 is there. Raises ValueError if they are too many.
    """
    if len(filesystems) > _FUNCTIONS:
        raise ValueError(f"{len(filesystems)} file systems: want {_FUNCTIONS} at most")
    for number, each in reversed(list(enumerate(filesystems))):
        address = {"type": "unix", "data": {"path": each.source}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        place = {"bus": bus, "addr": f"0x0.{number:#x}", "multifunction": number == 0 and len(filesystems) > 1}
        device = {"driver": "vhost-user-fs-pci", "id": f"fs{number}", "chardev": f"charfs{number}", "tag": each.tag}
        yield {"id": f"charfs{number}", "backend": backend}, {**device, **place, "queue-size": _QUEUE_SIZE}


def free_bus(pci: Sequence[dict[str, Any]]) -> str:
    """A root port that nothing is plugged into, by QMP's answer to query-pci; '' if there is none."""
    for bus in pci:
        for device in bus.get("devices", ()):
            below = device.get("pci_bridge")
            if below and device.get("qdev_id") and not below.get("devices"):
                return str(device["qdev_id"])
    return ""
