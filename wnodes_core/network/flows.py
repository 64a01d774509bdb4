"""OpenFlow rules of a lease's port on an Open vSwitch bridge: the same law as ``filters``, in a switch's words.

A switch in user space takes frames before nftables sees them, so the law has to be in the switch. Numbers in
``priority``: what is more particular comes first; below all of ours the site's own rules, or the switch's NORMAL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import product

from wnodes_core.api import Port
from wnodes_core.network.filters import link_local6
from wnodes_core.network.names import LINK_LOCAL

NODE_COOKIE = 0x776E6F646573  # of the rules that all ports of a bridge share
_LAST = 30100  # whatever the guest sends that nothing allowed


def cookie(lease: str) -> int:
    """The mark on a lease's rules."""
    return int.from_bytes(hashlib.sha256(lease.encode()).digest()[:7]) | 1 << 60


def of_bridge(*, ours: bool) -> list[str]:
    """Node traffic stays inside: but for the ports' own rules for it, it is dropped wherever it comes from.

    A bridge of ours switches nothing unless told to, so that one whose rules were lost is closed, not open.
    """
    matches = [f"ip,nw_{end}={LINK_LOCAL}" for end in ("src", "dst")]
    matches += [f"arp,arp_{end}={LINK_LOCAL}" for end in ("spa", "tpa")]
    rules = [f"cookie={NODE_COOKIE:#x},priority=30185,{match},actions=drop" for match in matches]
    return rules + ([f"cookie={NODE_COOKIE:#x},priority=1,actions=NORMAL"] if ours else [])


def of_port(port: Port, number: int, node_mac: str, meter: int) -> list[str]:
    """All rules of a port with that OpenFlow number; ``meter`` 0 = no limit."""
    onwards = f"meter:{meter},NORMAL" if meter else "NORMAL"
    own = f"in_port={number},dl_src={port.mac}"
    mark = f"cookie={cookie(port.lease):#x}"
    rules = [
        (30200, f"in_port={number},vlan_tci=0x1000/0x1000", "drop"),
        *((30190, f"{own},{match}", "LOCAL") for match in _to_node(port)),
        (30190, f"in_port=LOCAL,arp,arp_tpa={port.local}", f"output:{number}"),
        (30190, f"in_port=LOCAL,ip,nw_dst={port.local}", f"output:{number}"),
        # By its MAC the node is reached from no tenant's network; the way above needs no switching.
        (30180, f"in_port={number},dl_dst={node_mac}", "drop"),
        *((30180, f"in_port={number},udp,{each}", "drop") for each in ("tp_src=67", "tp_dst=68")),
        # The switch knows no ports of fragments, of the first neither, and Linux puts them together again.
        *((30180, f"in_port={number},{each},ip_frag=yes", "drop") for each in ("udp", "ipv6")),
        *((30170, f"{own},{match}", onwards) for match in _four(port)),
        *_six(port, number, own, onwards),
        (_LAST, f"in_port={number}", "drop"),
    ]
    return [f"{mark},priority={priority},{match},actions={actions}" for priority, match, actions in rules]


def _to_node(port: Port) -> Iterator[str]:
    yield f"arp,arp_sha={port.mac},arp_spa={port.local},arp_tpa={port.node}"
    # ip_frag=no: of a fragment the switch knows neither flags nor ports, and takes them for 0.
    ends = f"nw_src={port.local},nw_dst={port.node},ip_frag=no"
    yield from (f"icmp,{ends},icmp_type={kind}" for kind in (0, 3, 8))
    yield f"tcp,{ends},tcp_flags=+ack"  # answers to what the node itself has begun
    yield f"tcp,{ends},tcp_flags=-syn"
    yield from (f"tcp,{ends},tp_dst={number}" for number in port.open_ports)


def _four(port: Port) -> Iterator[str]:
    addresses = [each.partition("/")[0] for each in port.addresses if ":" not in each]
    if not port.addresses:  # not ours to give: only the MAC is held
        yield f"arp,arp_sha={port.mac}"
        yield from (f"ip{reach}" for reach in _reach(port, "nw_dst", four=True))
    for address in addresses:
        yield f"arp,arp_sha={port.mac},arp_spa={address}"
        yield f"arp,arp_sha={port.mac},arp_op=1,arp_spa=0.0.0.0,arp_tpa={address}"
        yield from (f"ip,nw_src={address}{reach}" for reach in _reach(port, "nw_dst", four=True))


def _six(port: Port, number: int, own: str, onwards: str) -> Iterator[tuple[int, str, str]]:
    addresses = [each.partition("/")[0] for each in port.addresses if ":" in each]
    if not addresses:
        return
    addresses.append(link_local6(port.mac))
    # RFC 4861: asking for routers (133), their advertisement (134) and redirect (137); RFC 8415, 7.2: DHCP's ports.
    matches = [*(f"icmp6,icmp_type={kind}" for kind in (133, 134, 137)), "udp6,tp_src=547", "udp6,tp_dst=546"]
    matches.append("ipv6,nw_proto=0")  # a chain of headers that does not end in the frame
    yield from ((30180, f"in_port={number},{match}", "drop") for match in matches)
    # Neighbours: of whose options the switch can make nothing, it takes for one without options and target.
    yield 30177, f"in_port={number},icmp6,icmp_type=135,nd_target=::", "drop"
    yield from ((30175, f"in_port={number},icmp6,icmp_type={kind}", "drop") for kind in (135, 136))
    macs = (port.mac, "00:00:00:00:00:00")  # none is fine, too
    for address in addresses:
        yield 30176, f"{own},icmp6,icmp_type=135,ipv6_src=::,nd_target={address}", onwards
        for source, mac in product(addresses, macs):
            advert = f"icmp6,icmp_type=136,ipv6_src={source},nd_target={address},nd_tll={mac}"
            yield 30176, f"{own},{advert}", onwards
        for reach in _reach(port, "ipv6_dst", four=False):
            yield 30170, f"{own},ipv6,ipv6_src={address}{reach}", onwards
            for mac in macs:
                yield 30176, f"{own},icmp6,icmp_type=135,ipv6_src={address},nd_sll={mac}{reach}", onwards


def _reach(port: Port, field: str, *, four: bool) -> Sequence[str]:
    if not port.closed:
        return [""]
    places = [each for each in port.allow if (":" not in each) == four]
    return [f",{field}={each}" for each in (*places, *(() if four else ("fe80::/10", "ff02::/16")))]
