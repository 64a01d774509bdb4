"""nftables rules of a lease's port: what its guest may send, and what of that the node itself takes.

Two tables a tap, two places. ``netdev`` sees every frame as it leaves the guest, before any bridge: also those
for reserved MACs, which a bridge takes without asking its own prerouting hook. ``bridge`` sees what the bridge
hands up to the node. Each bridge has one more table for its uplink. All text here is of values that the settings
or we made (parsed addresses, checked names), none of it a user's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from wnodes_core.api import Port
from wnodes_core.network.names import LINK_LOCAL

# ND messages carry the address they speak of in bytes 8 to 23 (RFC 4861, 4.3 and 4.4).
_ND_TARGET = "@th,64,128"


def of_tap(port: Port) -> str:
    """Replace (in one transaction) both tables of a port's tap."""
    four = [each.partition("/")[0] for each in port.addresses if ":" not in each]
    six = [each.partition("/")[0] for each in port.addresses if ":" in each]
    bare = not port.addresses  # a network whose addresses are not ours to give: only the MAC is held
    chains = [
        _chain("arp_from_guest", _arp(port, four, bare)),
        _chain("ip_from_guest", _ip(port, four, bare)),
        _chain("ip6_from_guest", _ip6(port, six) if six else ()),
        _chain(
            "ingress", _ingress(port), f'type filter hook ingress device "{port.device}" priority -150; policy drop;'
        ),
    ]
    node = [
        _chain("to_node", _to_node(port)),
        _chain(
            "input", [f'iifname "{port.device}" goto to_node'], "type filter hook input priority -200; policy accept;"
        ),
    ]
    return _table("netdev", port.device, chains) + _table("bridge", port.device, node)


def of_tap_in_user_space(device: str) -> str:
    """Let nothing of a tap's into the node's own stack, where a switch in user space has its frames already."""
    rules = f'type filter hook ingress device "{device}" priority -150; policy drop;'
    return _table("netdev", device, [_chain("ingress", (), rules)])


def of_uplink(bridge: str, uplink: str) -> str:
    """Replace the table that keeps node traffic inside and the node itself out of the tenants' network."""
    inside = []
    for side in ("iifname", "oifname"):
        for end in ("saddr", "daddr"):
            inside.append(f'{side} "{uplink}" ether type ip ip {end} {LINK_LOCAL} drop')
            inside.append(f'{side} "{uplink}" ether type arp arp {end} ip {LINK_LOCAL} drop')
    return _table(
        "bridge",
        bridge,
        [
            _chain("forward", inside, "type filter hook forward priority -200; policy accept;"),
            _chain("input", [f'iifname "{uplink}" drop'], "type filter hook input priority -200; policy accept;"),
            _chain("output", [f'oifname "{uplink}" drop'], "type filter hook output priority -200; policy accept;"),
        ],
    )


def without(device: str, families: Sequence[str]) -> str:
    """Remove a device's tables, also those that are not there."""
    return "".join(
        f"add table {family} wnodes-{device}\ndelete table {family} wnodes-{device}\n" for family in families
    )


def _table(family: str, device: str, chains: Sequence[str]) -> str:
    return without(device, [family]) + f"table {family} wnodes-{device} {{\n" + "".join(chains) + "}\n"


def _chain(name: str, rules: Sequence[str], head: str = "") -> str:
    lines = [*([head] if head else []), *rules]
    return f"  chain {name} {{\n" + "".join(f"    {line}\n" for line in lines) + "  }\n"


def _ingress(port: Port) -> list[str]:
    rules = [f"ether saddr != {port.mac} drop"]  # always there: no shorter frame leaves a device
    if port.rate_mbit:
        kbytes = port.rate_mbit * 125
        rules.append(f"limit rate over {kbytes} kbytes/second burst {max(64, kbytes // 50)} kbytes drop")
    # By the type in the frame itself: a tagged frame has another there, so no VLAN can be hopped to.
    return rules + [f"ether type {kind} goto {kind}_from_guest" for kind in ("arp", "ip", "ip6")]


# Where a frame is too short for what a rule compares, the rule does not hold, whichever way it is put. So what lets
# pass says what must be there, and never that something must not.
def _arp(port: Port, four: Sequence[str], bare: bool) -> list[str]:
    own, mine = f"{{ {', '.join(four)} }}", f"arp htype 1 arp saddr ether {port.mac}"
    rules = [f"{mine} arp saddr ip {port.local} arp daddr ip {port.node} accept"] if port.local else []
    rules += [f"arp {end} ip {LINK_LOCAL} drop" for end in ("saddr", "daddr")]
    if bare:
        rules.append(f"{mine} arp daddr ip != {LINK_LOCAL} accept")
    if four:
        rules.append(f"{mine} arp saddr ip {own} arp daddr ip != {LINK_LOCAL} accept")
        rules.append(f"{mine} arp operation request arp saddr ip 0.0.0.0 arp daddr ip {own} accept")
    return rules


def _ip(port: Port, four: Sequence[str], bare: bool) -> list[str]:
    rules = [f"ip saddr {port.local} ip daddr {port.node} accept"] if port.local else []
    rules += [f"ip {end} {LINK_LOCAL} drop" for end in ("saddr", "daddr")]
    rules.append("udp sport 67 drop")  # a guest is nobody's DHCP server
    own = f"ip saddr {{ {', '.join(four)} }}" if four else "ip protocol 0-255" if bare else ""
    return [*rules, *(f"{own} {place} accept" for place in _reach(port, "ip") if own)]


def _ip6(port: Port, six: Sequence[str]) -> list[str]:
    addresses = [*six, link_local6(port.mac)]
    own = f"ip6 saddr {{ {', '.join(addresses)} }}"
    targets = [f"{_ND_TARGET} {int(ipaddress.IPv6Address(each)):#x}" for each in addresses]
    # RFC 4861, 4.2 and 4.5: a router's words; RFC 8415, 7.2: a DHCP server's port.
    return [
        # The transport's header must stand in the first fragment, or the rules below see none of it.
        "frag nexthdr != { tcp, udp, icmpv6 } drop",
        "icmpv6 type { nd-router-advert, nd-redirect } drop",
        "udp sport 547 drop",
        *(f"icmpv6 type nd-neighbor-advert {each} {own} accept" for each in targets),
        "icmpv6 type nd-neighbor-advert drop",
        *(f"icmpv6 type nd-neighbor-solicit ip6 saddr :: {each} accept" for each in targets),
        *(f"{own} {place} accept" for place in _reach(port, "ip6")),
    ]


def _reach(port: Port, family: str) -> list[str]:
    """Where to a port's packets may go: everywhere, or to the places of a closed network."""
    if not port.closed:
        return [f"ip daddr != {LINK_LOCAL}" if family == "ip" else "ip6 daddr != ::1"]
    places = [each for each in port.allow if (":" in each) == (family == "ip6")]
    places += ["fe80::/10", "ff02::/16"] if family == "ip6" else []  # without these two there are no neighbours
    return [f"{family} daddr {{ {', '.join(places)} }}"] if places else []


def _to_node(port: Port) -> list[str]:
    if not port.local:
        return ["drop"]
    to_us = f"ether type ip ip saddr {port.local} ip daddr {port.node}"
    rules = [
        f"ether type arp arp daddr ip {port.node} accept",
        f"{to_us} icmp type {{ echo-request, echo-reply, destination-unreachable }} accept",
        f"{to_us} tcp flags & (syn | ack) != syn accept",  # answers to what the node itself has begun
    ]
    if port.node_ports:
        rules.append(f"{to_us} tcp dport {{ {', '.join(map(str, port.node_ports))} }} accept")
    return [*rules, "drop"]


def link_local6(mac: str) -> str:
    """The link-local IPv6 address that follows from a MAC (RFC 4291, appendix A).

    >>> link_local6("02:00:00:00:00:07")
    'fe80::ff:fe00:7'
    """
    raw = bytearray.fromhex(mac.replace(":", ""))
    raw[0] ^= 2
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes(raw[:3]) + b"\xff\xfe" + bytes(raw[3:])))
