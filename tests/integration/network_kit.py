"""A guest that the test itself plays, and all that it may not send, whatever the bridge is made of."""

from __future__ import annotations

import contextlib
from typing import Any

from netns_kit import BROADCAST, Tap, Wiretap, arp, ether, ipv4, ipv6, udp

from wnodes_core.network import filters

NODE = "169.254.77.1"


class Vm:
    """A port that is attached, and its guest's end."""

    def __init__(self, stack: contextlib.ExitStack, node: Any, lease: str = "vm", network: str = "a", **more: Any) -> None:
        self.port = node.port(lease, network, **more)
        self.node = node
        stack.callback(node.detach, self.port)
        self.nic = node.attach(self.port)
        self.tap = Tap(node.space, self.port.device, self.port.mac)
        stack.callback(self.tap.close)
        self.mac, self.ip = self.port.mac, self.port.addresses[0].partition("/")[0]
        self.node_mac = self.nic.neighbours[0][1]
        self.tap.frames(0.02)

    def udp(self, receiver: str, target: str = BROADCAST, **more: Any) -> bytes:
        return udp(more.pop("source", self.mac), target, more.pop("sender", self.ip), receiver, **more)


def outside(stack: contextlib.ExitStack, node: Any, network: str = "a") -> Wiretap:
    """All that leaves the node by a network's cable."""
    tap = Wiretap(node.wire, node.cable(network))
    stack.callback(tap.close)
    return tap


def came(taken: list[bytes], frame: bytes) -> bool:
    # A bridge may cut a frame's padding off.
    return any(len(each) > 40 and frame.startswith(each.rstrip(b"\0")) for each in taken)


def forbidden(vm: Vm) -> dict[str, bytes]:
    """What no guest may send, by what it tries."""
    mac, ip, other = vm.mac, vm.ip, "10.1.1.99"
    foreign = "02:de:ad:00:00:01"
    return {
        "another's MAC": vm.udp(other, source=foreign),
        "another's address": vm.udp(other, sender="10.1.2.77"),
        "the gateway's address": vm.udp(other, sender="10.1.0.1"),
        "the node's address": vm.udp(other, sender=NODE),
        "a link-local address to others": vm.udp(other, sender="169.254.80.10"),
        "link-local to whom it may concern": vm.udp("169.254.80.11", sender="169.254.80.10"),
        "to link-local from outside it": vm.udp("169.254.169.254"),
        "to the node from the network's address": vm.udp(NODE, vm.node_mac),
        "ARP for another": arp(mac, "10.1.2.77", other),
        "ARP reply for the gateway": arp(mac, "10.1.0.1", other, operation=2),
        "ARP with another's MAC in it": arp(mac, ip, other, says=foreign),
        "ARP in another's name": arp(foreign, ip, other),
        "ARP for the node's address": arp(mac, NODE, ip, operation=2),
        "ARP of no Ethernet": arp(mac, ip, other)[:14] + b"\0\x06" + arp(mac, ip, other)[16:],
        "a tagged frame": vm.udp(other, tags=((0x8100, 43),)),
        "a priority-tagged frame": vm.udp(other, tags=((0x8100, 0),)),
        "a doubly tagged frame": vm.udp(other, tags=((0x8100, 42), (0x8100, 43))),
        "a provider's tag": vm.udp(other, tags=((0x88A8, 43),)),
        "both kinds of tag": vm.udp(other, tags=((0x88A8, 42), (0x8100, 43))),
        "tagged ARP": arp(mac, ip, other, tags=((0x8100, 43),)),
        "spanning tree": ether(mac, "01:80:c2:00:00:00", 39, b"\x42\x42\x03" + bytes(36)),
        "LLDP": ether(mac, "01:80:c2:00:00:0e", 0x88CC, bytes(40)),
        "pause": ether(mac, "01:80:c2:00:00:01", 0x8808, bytes(40)),
        "MPLS": ether(mac, BROADCAST, 0x8847, bytes(40)),
        "a protocol of its own": ether(mac, BROADCAST, 0x88B5, bytes(40)),
        "DHCP server": vm.udp("255.255.255.255", ports=(67, 68)),
        "router advertisement": ipv6(mac, "33:33:00:00:00:01", filters.link_local6(mac), "ff02::1", 134, bytes(12)),
        "IPv6 where there is none": ipv6(mac, "33:33:00:00:00:01", "fd00::7", "ff02::1", 128, bytes(4)),
        "an IPv4 packet called IPv6": ether(mac, BROADCAST, 0x86DD, ipv4(ip, other, 17, bytes(16))),
        "an IPv6 packet called IPv4": ether(mac, BROADCAST, 0x800, ipv6(mac, BROADCAST, "fd00::7", "ff02::1", 128, bytes(4))[14:]),
        "ARP cut short": arp(mac, ip, other)[:26],
        "a header cut short": ether(mac, BROADCAST, 0x800, ipv4(ip, other, 17, b""))[:24],
    }  # fmt: skip
