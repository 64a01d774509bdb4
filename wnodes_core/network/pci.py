"""PCI devices of the host for a VM: virtual functions of a network card (SR-IOV), or any device by its address.

The device is taken from the host's driver, bound to vfio-pci and its group given to the job's user; back it goes in
the reverse order, and a function's MAC and VLAN are cleared. What the kernel offers for this: its documentation of
``driver_override`` (Documentation/ABI/testing/sysfs-bus-pci) and of VFIO (Documentation/driver-api/vfio.rst).
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wnodes_core.api import Nic, Port, Route, errors, hookimpl
from wnodes_core.network import bridge
from wnodes_core.tools import read, run, spawn

wnodes_api = 1
SYS, DEV = Path("/sys"), Path("/dev")
_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z")
_DRIVER = "vfio-pci"
_BRIDGE_CLASS = "0x0604"  # bridges of a group are not given away with it (vfio.rst)
_SETTLES_S = 2.0
_WRITE_S = 5.0  # a driver lets go of a card within one or two
_waiting: dict[Path, Any] = {}  # children whose write the kernel has not finished
_NO_MAC = "00:00:00:00:00:00"


@hookimpl
def wnodes_port_allot(port: Port, taken: Sequence[Port]) -> Port | None:
    """A device that matches and that no other lease has. A whole card keeps its own MAC."""
    if port.kind != "pci":
        return None
    used = {other.device for other in taken if other.kind == "pci"}
    known = _matching(port)
    for address in known:
        if address not in used:
            return replace(port, device=address, mac=port.mac if _parent(address) else _own_mac(address))
    if not known:
        where = f"device {port.uplink} with virtual functions" if port.uplink else "such PCI device"
        raise errors.TransientError(f"network {port.network!r}: this node has no {where}")
    raise errors.HostBusy(f"network {port.network!r}: all {len(known)} devices are in use on this node")


@hookimpl
def wnodes_port_attach(port: Port) -> Nic | None:
    """Give the device to the job's user; for one that has it already, see that it is so."""
    if port.kind != "pci":
        return None
    device = _device(port.device)
    if not device.is_dir():
        raise errors.TransientError(f"network {port.network!r}: PCI device {port.device} is not there")
    _check_group(port)
    with bridge.errors_told(port):
        _set_function(port, port.mac, port.vlan, port.rate_mbit)
        _bind(port, _DRIVER)
        _own_group(port, port.uid)
    routes = tuple(Route("::/0" if ":" in each else "0.0.0.0/0", each) for each in port.gateways)
    return Nic("pci", port.mac, port.device, addresses=port.addresses, routes=routes, dns=port.dns, mtu=port.mtu)


@hookimpl
def wnodes_port_detach(port: Port) -> bool | None:
    """Take it back for the host, as it was. Raises TransientError while somebody has it open."""
    if port.kind != "pci":
        return None
    if _device(port.device).is_dir():
        _own_group(port, 0)
        _check_unused(port)
        _bind(port, "")
        with bridge.errors_told(port):
            _set_function(port, _NO_MAC, 0, 0)
    return True


def _device(address: str) -> Path:
    """A device's folder. Raises ValueError for what is no address: it becomes part of a path that root follows."""
    if not _ADDRESS.match(address):
        raise ValueError(f"PCI address {address!r}: want DOMAIN:BUS:SLOT.FUNCTION")
    return SYS / "bus/pci/devices" / address


def _matching(port: Port) -> list[str]:
    if not port.devices:
        functions = (SYS / "class/net" / port.uplink / "device").glob("virtfn*")
        ordered = sorted(functions, key=lambda path: int(path.name[6:] or 0))
        return [os.path.basename(os.path.realpath(path)) for path in ordered]
    with suppress(FileNotFoundError):
        known = sorted(os.listdir(SYS / "bus/pci/devices"))
        return [each for each in known if any(fnmatchcase(each, pattern) for pattern in port.devices)]
    return []


def _group(address: str) -> Path | None:
    link = _device(address) / "iommu_group"
    return Path(os.path.realpath(link)) if link.exists() else None


def _check_group(port: Port) -> None:
    """The IOMMU keeps groups apart, not devices: a neighbour within the group would be within the guest's reach.

    Raises TransientError.
    """
    group = _group(port.device)
    if group is None:
        raise errors.TransientError(
            f"network {port.network!r}: PCI device {port.device} has no IOMMU group",
            hint="switch the IOMMU on: intel_iommu=on or amd_iommu=on for the kernel, VT-d or AMD-Vi in the firmware",
        )
    others = [each for each in os.listdir(group / "devices") if each != port.device and not _is_harmless(each)]
    if others:
        shown = ", ".join(sorted(others))
        raise errors.TransientError(
            f"network {port.network!r}: PCI device {port.device} shares its IOMMU group with {shown}"
        )


def _is_harmless(address: str) -> bool:
    return _text(_device(address) / "class").startswith(_BRIDGE_CLASS) or not _driver(address)


def _driver(address: str) -> str:
    link = _device(address) / "driver"
    return os.path.basename(os.path.realpath(link)) if link.exists() else ""


def _bind(port: Port, driver: str) -> None:
    """Bind to ``driver``, or with '' to what the host has for the device. Raises TransientError."""
    address, device, now = port.device, _device(port.device), _driver(port.device)
    if driver == now != "":
        return
    _write(device / "driver_override", driver or "\n")
    if not driver and now not in ("", _DRIVER):
        return  # it never left the host
    if now:
        _write(device / "driver/unbind", address)
    _write(SYS / "bus/pci/drivers_probe", address)
    if driver and not _waited(lambda: _driver(address) == driver):
        raise errors.TransientError(
            f"network {port.network!r}: PCI device {address} does not go to {driver}", hint=f"modprobe {driver}"
        )


def _own_group(port: Port, uid: int) -> None:
    group = _group(port.device)
    node = DEV / "vfio" / (group.name if group else "")
    if group is None or (not uid and not node.exists()):
        return
    if not _waited(node.exists):
        raise errors.TransientError(f"network {port.network!r}: no {node} for PCI device {port.device}")
    os.chown(node, uid, 0)
    os.chmod(node, 0o600)


def _check_unused(port: Port) -> None:
    """The kernel unbinds a device only once its last user has closed it, and waits for that without end.

    Nobody can come by it any more: the group is root's by now. Raises TransientError.
    """
    group = _group(port.device)
    node = DEV / "vfio" / (group.name if group else "")
    if _driver(port.device) != _DRIVER or group is None or not node.exists():
        return
    users = sorted(_users(str(node)))
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:  # by its device's descriptor alone, too, which shows no name
            users = users or ["a process that cannot be seen"]
    if users:
        raise errors.TransientError(
            f"network {port.network!r}: PCI device {port.device} is held open by {', '.join(users)}",
            hint="it goes back to the host once they have closed it",
        )


def _users(node: str) -> Iterator[str]:
    """Processes that have a file open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if any(_target(f"/proc/{pid}/fd/{fd}") == node for fd in os.listdir(f"/proc/{pid}/fd")):
                process = read(int(pid))
                yield f"process {pid} ({os.path.basename(process.exe) if process else '?'})"


def _target(link: str) -> str:
    with suppress(OSError):
        return os.readlink(link)
    return ""


def _parent(address: str) -> tuple[str, int] | None:
    """The network device that a virtual function belongs to, and its number there."""
    physical = _device(address) / "physfn"
    if not physical.exists():
        return None
    functions = ((path, os.path.basename(os.path.realpath(path))) for path in physical.glob("virtfn*"))
    number = next((int(path.name[6:]) for path, name in functions if name == address), None)
    device = next(iter(sorted(os.listdir(physical / "net"))), "") if (physical / "net").is_dir() else ""
    return (device, number) if device and number is not None else None


def _set_function(port: Port, mac: str, vlan: int, rate_mbit: int) -> None:
    """Have the card itself hold a virtual function to its MAC and VLAN; the guest can change neither."""
    found = _parent(port.device)
    if found is None:
        return
    device, number = found
    words = ["mac", mac, "vlan", str(vlan), "spoofchk", "on", "trust", "off"]
    if port.rate_mbit:  # not every card can
        words += ["max_tx_rate", str(rate_mbit)]
    run(["ip", "link", "set", "dev", device, "vf", str(number), *words])


def _own_mac(address: str) -> str:
    """The MAC of a device that is a whole network card, as the host's driver shows it; '' for any other device."""
    return next((_text(path) for path in (_device(address) / "net").glob("*/address")), "")


def _waited(true: Callable[[], bool], most_s: float | None = None) -> bool:
    deadline = time.monotonic() + (most_s or _SETTLES_S)
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def _write(path: Path, text: str) -> None:
    """Write to a file of sysfs by a child: the kernel may wait in it for ever, not even to be killed.

    Raises OSError; TransientError after ``_WRITE_S``, and at once while such a child is still there.
    """
    late = errors.TransientError(f"{path}: the kernel takes no {text.strip()!r} within {_WRITE_S:g} s")
    if path in _waiting and _waiting[path].poll() is None:
        raise late
    _waiting.pop(path, None)
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    with tempfile.TemporaryFile() as said:
        child = spawn(["tee", "--", str(path)], stdin=reader, stderr=said.fileno())
        os.close(reader)
        if not _waited(lambda: child.poll() is not None, _WRITE_S):
            child.kill()
            _waiting[path] = child
            raise late
        said.seek(0)
        if child.returncode:
            raise OSError(said.read(300).decode(errors="replace").strip())
