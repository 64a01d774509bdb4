"""The guest's addresses: set through netlink, so that no iproute2, no DHCP and no wait is needed. Part of the agent.

What the network's own services would offer besides is switched off for this NIC: the host's word counts.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from wnodes_core.guest import guest_json

# linux/rtnetlink.h, linux/if_addr.h, linux/if_link.h, linux/neighbour.h
_NEWLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 20, 24, 28
_REQUEST_ACK, _CREATE_REPLACE = 0x1 | 0x4, 0x400 | 0x100
_IFF_UP, _NODAD, _PERMANENT = 1, 2, 0x80
_TABLE_MAIN, _STATIC, _UNICAST, _SCOPE_LINK = 254, 4, 1, 253
_SYSCTLS = (
    ("ipv4", "arp_notify", "1"),  # neighbours that knew the address by another MAC are told
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "autoconf", "0"),
    ("ipv6", "addr_gen_mode", "0"),  # the link-local address that follows from the MAC: the one we let pass
)


def set_up(nic: dict[str, Any], root: str) -> dict[str, Any]:
    """Bring the NIC up with all it is given: ``{"name"}``, or if it is not to be seen ``{"missing": aliases}``."""
    if root:  # a test's guest, which is no machine of its own: nothing but the order is noted
        with open(root + "/network.json", "wb") as file:
            file.write(guest_json.dumps(nic))
        return {"name": "none"}
    name = _find(nic["mac"])
    if not name:
        return {"missing": _driverless()}
    for family, key, value in _SYSCTLS:
        _write("/proc/sys/net/%s/conf/%s/%s" % (family, name, key), value)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        _configure(link, socket.if_nametoindex(name), nic)
    if nic["dns"]:
        _name_servers(nic["dns"])
    return {"name": name}


def _find(mac: str) -> str:
    for name in os.listdir("/sys/class/net"):
        try:
            with open("/sys/class/net/%s/address" % name) as file:
                if file.read().strip() == mac:
                    return name
        except OSError:
            pass  # it is just going
    return ""


def _driverless() -> list[str]:
    """What modprobe knows the devices by that nobody drives: a guest without udev loads no driver by itself."""
    found = []
    for bus in ("pci", "virtio"):
        folder = "/sys/bus/%s/devices" % bus
        for device in os.listdir(folder) if os.path.isdir(folder) else ():
            try:
                with open("%s/%s/modalias" % (folder, device)) as file:
                    alias = file.read().strip()
            except OSError:
                continue
            wanted = bus == "virtio" or "bc02" in alias  # PCI class 02: network
            if wanted and not os.path.exists("%s/%s/driver" % (folder, device)):
                found.append(alias)
    return found


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass  # a kernel without it has nothing to be switched off


def _configure(link: socket.socket, index: int, nic: dict[str, Any]) -> None:
    mtu = _attribute(4, struct.pack("=I", nic["mtu"])) if nic["mtu"] else b""
    _ask(link, _NEWLINK, struct.pack("=BxHiII", 0, 0, index, _IFF_UP, _IFF_UP) + mtu)
    for address in nic["addresses"]:
        host, _, length = address.partition("/")
        family, raw = _packed(host)
        body = struct.pack("=BBBBI", family, int(length), _NODAD if family == socket.AF_INET6 else 0, 0, index)
        _ask(link, _NEWADDR, body + _attribute(2, raw) + _attribute(1, raw))
    for address, mac in nic["neighbours"]:
        family, raw = _packed(address)
        body = struct.pack("=BxHiHBB", family, 0, index, _PERMANENT, 0, 0)
        _ask(link, _NEWNEIGH, body + _attribute(1, raw) + _attribute(2, bytes.fromhex(mac.replace(":", ""))))
    for route in nic["routes"]:
        _route(link, index, route)


def _route(link: socket.socket, index: int, route: dict[str, str]) -> None:
    host, _, length = route["to"].partition("/")
    family, raw = _packed(host)
    scope = 0 if route["via"] or family == socket.AF_INET6 else _SCOPE_LINK
    body = struct.pack("=BBBBBBBBI", family, int(length), 0, 0, _TABLE_MAIN, _STATIC, scope, _UNICAST, 0)
    if int(length):
        body += _attribute(1, raw)
    body += _attribute(4, struct.pack("=I", index))
    if route["via"]:
        body += _attribute(5, _packed(route["via"])[1])
    if route["source"]:
        body += _attribute(7, _packed(route["source"])[1])
    _ask(link, _NEWROUTE, body)


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _ask(link: socket.socket, kind: int, body: bytes) -> None:
    """One order to the kernel. Raises OSError with its answer."""
    flags = _REQUEST_ACK if kind == _NEWLINK else _REQUEST_ACK | _CREATE_REPLACE
    link.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    number = -struct.unpack_from("=i", link.recv(4096), 16)[0]
    if number:
        raise OSError(number, "netlink message %d: %s" % (kind, os.strerror(number)))


def _name_servers(servers: list[str]) -> None:
    """Replace resolv.conf, which on many images is a link to a service's that knows nothing of this NIC."""
    with open("/etc/resolv.conf.wnodes", "w") as file:
        file.write("".join("nameserver %s\n" % server for server in servers))
    os.chmod("/etc/resolv.conf.wnodes", 0o644)
    os.rename("/etc/resolv.conf.wnodes", "/etc/resolv.conf")
