"""What no guest may send, whatever its port is made of: the enemy's half of the network contract."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from wnodes_core.api import Port
from wnodes_core.network.filters import link_local6
from wnodes_core.testing import frames
from wnodes_core.testing.frames import BROADCAST, arp, ether, fragments, ipv4, ipv6, snap, udp

STRANGER = "02:de:ad:00:00:01"
_OTHER, _FOREIGN, _ROUTER = "10.1.1.99", "10.1.2.77", "10.1.0.1"
_EVERYBODY6 = "33:33:00:00:00:01"
_SOURCE_ROUTES = {"loose": b"\x83\x07\x04\x0a\x09\x09\x09\0", "strict": b"\x89\x07\x04\x0a\x09\x09\x09\0"}


def forbidden(port: Port) -> dict[str, bytes]:
    """Frames of a guest in 10.1.0.0/16, without IPv6, of which none may get anywhere; by what each tries."""
    return {**_in_ip(port), **_in_arp(port), **_in_ethernet(port)}


def _ip(port: Port) -> str:
    return port.addresses[0].partition("/")[0]


def _udp(port: Port, receiver: str = _OTHER, target: str = BROADCAST, **more: object) -> bytes:
    made: dict[str, object] = {"source": port.mac, "sender": _ip(port), **more}
    return udp(target=target, receiver=receiver, **made)  # type: ignore[arg-type]


def _in_ip(port: Port) -> dict[str, bytes]:
    mac, ip = port.mac, _ip(port)
    advert = ipv6(mac, _EVERYBODY6, link_local6(mac), "ff02::1", 134, bytes(12))
    return {
        "another's MAC": _udp(port, source=STRANGER),
        "another's address": _udp(port, sender=_FOREIGN),
        "the gateway's address": _udp(port, sender=_ROUTER),
        "the node's address": _udp(port, sender=port.node),
        "a link-local address to others": _udp(port, sender=port.local),
        "link-local to whom it may concern": _udp(port, "169.254.80.11", sender=port.local),
        "to link-local from outside it": _udp(port, "169.254.169.254"),
        "to the node from the network's address": _udp(port, port.node),
        "DHCP server": _udp(port, "255.255.255.255", ports=(67, 68)),
        "DHCP server by another port": _udp(port, "255.255.255.255", ports=(4000, 68)),
        "router advertisement": advert,
        "IPv6 where there is none": ipv6(mac, _EVERYBODY6, "fd00::7", "ff02::1", 128, bytes(4)),
        "an IPv4 packet called IPv6": ether(mac, BROADCAST, 0x86DD, ipv4(ip, _OTHER, 17, bytes(16))),
        "an IPv6 packet called IPv4": ether(mac, BROADCAST, 0x800, advert[14:]),
        "a header cut short": ether(mac, BROADCAST, 0x800, ipv4(ip, _OTHER, 17, b""))[:24],
    }


def source_routed(port: Port) -> dict[str, bytes]:
    """Packets that ask a router to send them round (RFC 791): the way out of a closed network."""
    return {name: _udp(port, options=option) for name, option in _SOURCE_ROUTES.items()}


def _in_arp(port: Port) -> dict[str, bytes]:
    mac, ip = port.mac, _ip(port)
    return {
        "ARP for another": arp(mac, _FOREIGN, _OTHER),
        "ARP reply for the gateway": arp(mac, _ROUTER, _OTHER, operation=2),
        "ARP with another's MAC in it": arp(mac, ip, _OTHER, says=STRANGER),
        "ARP in another's name": arp(STRANGER, ip, _OTHER),
        "ARP for the node's address": arp(mac, port.node, ip, operation=2),
        "gratuitous ARP for the node's address": arp(mac, port.node, port.node),
        "gratuitous ARP reply for the node's address": arp(mac, port.node, port.node, operation=2),
        "gratuitous ARP for a link-local address": arp(mac, port.local, port.local),
        "ARP from the node's address to it": arp(mac, port.node, port.local),
        "ARP of no Ethernet": arp(mac, ip, _OTHER)[:14] + b"\0\x06" + arp(mac, ip, _OTHER)[16:],
        "ARP cut short": arp(mac, ip, _OTHER)[:26],
        "reverse ARP": ether(mac, BROADCAST, 0x8035, arp(mac, ip, _OTHER, operation=3)[14:42]),
    }


def _in_ethernet(port: Port) -> dict[str, bytes]:
    mac, ip = port.mac, _ip(port)
    packet = ipv4(ip, _OTHER, 17, frames.datagram((4000, 5000)))
    tagged = {
        "a tagged frame": [(0x8100, 43)],
        "a priority-tagged frame": [(0x8100, 0)],
        "a doubly tagged frame": [(0x8100, 42), (0x8100, 43)],
        "a provider's tag": [(0x88A8, 43)],
        "a provider's priority tag": [(0x88A8, 0)],
        "both kinds of tag": [(0x88A8, 42), (0x8100, 43)],
        "three tags": [(0x8100, 0), (0x88A8, 42), (0x8100, 43)],
        "a tag of before the standard": [(0x9100, 43)],
        "two of them": [(0x9100, 42), (0x8100, 43)],
    }
    return {
        **{what: _udp(port, tags=tags) for what, tags in tagged.items()},
        "tagged ARP": arp(mac, ip, _OTHER, tags=((0x8100, 43),)),
        "spanning tree": ether(mac, "01:80:c2:00:00:00", 39, b"\x42\x42\x03" + bytes(36)),
        "another's address in SNAP": snap(mac, BROADCAST, 0x800, ipv4(_FOREIGN, _OTHER, 17, bytes(16))),
        "a tag in SNAP": snap(mac, BROADCAST, 0x8100, b"\0\x2b\x08\0" + packet),
        "IPX in LLC": ether(mac, BROADCAST, 40, b"\xe0\xe0\x03" + bytes(37)),
        "LLDP": ether(mac, "01:80:c2:00:00:0e", 0x88CC, bytes(40)),
        "pause": ether(mac, "01:80:c2:00:00:01", 0x8808, bytes(40)),
        "MPLS": ether(mac, BROADCAST, 0x8847, bytes(40)),
        "PPPoE": ether(mac, BROADCAST, 0x8864, bytes(40)),
        "a protocol of its own": ether(mac, BROADCAST, 0x88B5, bytes(40)),
    }


def in_pieces(port: Port) -> dict[str, list[bytes]]:
    """IPv4 packets in fragments, which are forbidden in one piece: of none may all pieces come through."""
    ends = (port.mac, BROADCAST, _ip(port), "255.255.255.255", 17)
    found = {}
    for what, ports in (("from", (67, 4000)), ("to", (4000, 68))):
        offer = frames.datagram(ports, bytes(40))
        found[f"DHCP {what} a server's port, whole header first"] = fragments(*ends, offer, 16)
        found[f"DHCP {what} a server's port, header alone"] = fragments(*ends, offer, 8)
    return found


def to_the_node_in_pieces(port: Port, node_mac: str, number: int) -> dict[str, list[bytes]]:
    """SYNs for a TCP port of the node that guests may not use."""
    ends = (port.mac, node_mac, port.local, port.node, 6)
    body = frames.segment(port.local, port.node, number)
    return {f"SYN, {cut} bytes first": fragments(*ends, body, cut) for cut in (8, 16)}


def allowed6(port: Port, six: str) -> dict[str, bytes]:
    """IPv6 that a guest with the address ``six`` needs: of neighbours, with the MAC in its places or none."""
    mac, own = port.mac, link_local6(port.mac)
    found = {"echo": ipv6(mac, BROADCAST, six, "fd00:1::1:11", 128, bytes(4))}
    for name, source in (("an address", six), ("a link-local address", own)):
        here = (mac, _EVERYBODY6, source, "ff02::1")
        found[f"advertisement of {name}"] = ipv6(*here, 136, _target(source))
        found[f"advertisement of {name} with its MAC"] = ipv6(*here, 136, _target(source) + _nd_option(2, mac))
        found[f"solicitation by {name}"] = ipv6(*here, 135, _target("fd00:1::1"))
        found[f"solicitation by {name} with its MAC"] = ipv6(*here, 135, _target("fd00:1::1") + _nd_option(1, mac))
        nonce = b"\x0e\x01nonce!"  # RFC 7527: is the address another's?
        found[f"is {name} free"] = ipv6(mac, _EVERYBODY6, "::", "ff02::1", 135, _target(source) + nonce)
    found["UDP behind options"] = ipv6(
        mac, BROADCAST, six, "fd00:1::1:11", 0, frames.behind_options(frames.datagram((4000, 5000)), 17), header=60
    )
    return found


def forbidden6(port: Port, six: str) -> Iterator[tuple[str, list[bytes]]]:
    """IPv6 of a guest with the address ``six``: of no entry may all frames come through."""
    mac, own, router = port.mac, link_local6(port.mac), "fd00:1::1"
    here = (mac, _EVERYBODY6, own, "ff02::1")
    options = _nd_option(2, STRANGER)
    advert = frames.icmp6(own, "ff02::1", 134, bytes(12))
    claim = frames.icmp6(six, "ff02::1", 136, _target(router) + _nd_option(2, mac))
    ends, chain = (own, "ff02::1"), frames.behind_options(advert)
    yield "router advertisement", [ipv6(*here, 134, bytes(12))]
    yield "router solicitation", [ipv6(*here, 133, bytes(4) + _nd_option(1, STRANGER))]
    yield "redirect", [ipv6(*here, 137, bytes(36))]
    yield "advertisement for another", [ipv6(mac, _EVERYBODY6, six, "ff02::1", 136, _target(router))]
    yield "advertisement with another's MAC", [ipv6(mac, _EVERYBODY6, six, "ff02::1", 136, _target(six) + options)]
    ask = _target(router) + _nd_option(1, STRANGER)
    yield "solicitation with another's MAC", [ipv6(mac, _EVERYBODY6, six, "ff02::1", 135, ask)]
    yield "advertisement with two MACs", [
        ipv6(mac, _EVERYBODY6, six, "ff02::1", 136, _target(six) + _nd_option(2, mac) + options)
    ]
    yield "solicitation with two MACs", [
        ipv6(mac, _EVERYBODY6, six, "ff02::1", 135, _target(router) + _nd_option(1, mac) + _nd_option(1, STRANGER))
    ]
    yield "another's address", [ipv6(mac, BROADCAST, "fd00:1::1:99", "fd00:1::1:11", 128, bytes(4))]
    yield "from nowhere", [ipv6(mac, BROADCAST, "::", "fd00:1::1:11", 128, bytes(4))]
    yield "solicitation from nowhere for another", [ipv6(mac, _EVERYBODY6, "::", "ff02::1", 135, _target(router))]
    for name, header in (("hop-by-hop", 0), ("routing", 43), ("destination", 60)):
        yield f"router advertisement behind {name}", [ipv6(*here, 0, chain, header=header)]
    yield "router advertisement behind two headers", [ipv6(*here, 0, frames.behind_options(chain, 60), header=0)]
    yield "DHCPv6 server", [ipv6(mac, BROADCAST, six, "fd00:1::1:11", 0, frames.datagram((547, 546)), header=17)]
    offer = frames.datagram((9, 546))
    yield "DHCPv6 server by another port", [ipv6(mac, BROADCAST, six, "ff02::1", 0, offer, header=17)]
    yield "router advertisement in pieces", frames.fragments6(mac, _EVERYBODY6, ends, advert, 8)
    yield "router advertisement in one piece of one", frames.fragments6(mac, _EVERYBODY6, ends, advert, 16)[:1]
    yield "router advertisement whose type is in the second piece", frames.fragments6(
        mac, _EVERYBODY6, ends, bytes([58, 1, 1, 12]) + bytes(12) + advert, 8, header=60
    )
    # The first piece has the length of a whole one, and what it lacks of the target where Ethernet pads.
    yield "advertisement for another in pieces", frames.fragments6(
        mac, _EVERYBODY6, (six, "ff02::1"), claim, 16, trailer=socket.inet_pton(socket.AF_INET6, six)[8:] + bytes(8)
    )


def _target(address: str) -> bytes:
    return bytes(4) + socket.inet_pton(socket.AF_INET6, address)


def _nd_option(kind: int, mac: str) -> bytes:
    """A link-layer address in ND: 1 the source's, 2 the target's (RFC 4861, 4.6.1)."""
    return bytes([kind, 1]) + frames.raw(mac)
