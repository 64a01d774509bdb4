"""From a Nic to the libvirt device that is plugged into a running domain."""

from __future__ import annotations

import re

from wnodes_core.api import Nic
from wnodes_core.backends.libvirt import objects
from wnodes_core.backends.libvirt.xml import Node

_PCI = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])\Z")


def of_nic(nic: Nic) -> Node | None:
    """The device, None for a kind that is not ours. Raises ValueError for a PCI address that is none."""
    mtu = nic.mtu or None
    # No option ROM (rom): no guest boots from this NIC, and the file would have to be there.
    if nic.kind == "user":
        return objects.Interface(type="user", mac=nic.mac)
    if nic.kind == "tap":
        return objects.Interface(type="ethernet", mac=nic.mac, tap=nic.device, managed=False, mtu=mtu)
    if nic.kind == "pci":
        return _host_device(nic.device)
    return None


def _host_device(address: str) -> Node:
    found = _PCI.match(address)
    if not found:
        raise ValueError(f"PCI address {address!r}: want DOMAIN:BUS:SLOT.FUNCTION as in 0000:3b:02.1")
    domain, bus, slot, function = (f"0x{word}" for word in found.groups())
    return objects.HostDevice(domain=domain, bus=bus, slot=slot, function=function)
