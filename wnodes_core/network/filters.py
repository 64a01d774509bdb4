"""nftables rules of a lease's port: what its guest may send, and what of that the node itself takes.

Two tables a tap, two places. ``netdev`` sees every frame as it leaves the guest, before any bridge: also those
for reserved MACs, which a bridge takes without asking its own prerouting hook. ``bridge`` sees what the bridge
hands up to the node. Each bridge has one more table for its uplink. All text here is of values that the settings
or we made (parsed addresses, checked names), none of it a user's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Sequence

from wnodes_core.api import Port
from wnodes_core.network.names import FIRST_OPEN, LINK_LOCAL, bridge

# ND messages carry the address they speak of in bytes 8 to 23 (RFC 4861, 4.3 and 4.4), then options. Ours have none
# or a single one of 8 bytes: kind, length 1, MAC.
_ND_TARGET, _ND_OPTION, _ND_LENGTH = "@th,64,128", "@th,192,64", 24


def of_tap(port: Port, present: Container[str]) -> str:
    """Replace (in one transaction) both tables of a port's tap; ``present`` are the tables there are."""
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
    tables = _table("netdev", port.device, chains, present) + _table("bridge", port.device, node, present)
    return tables + _of_own_ports(port, bridge(port), present)


def of_switched_tap(port: Port, present: Container[str], *, in_user_space: bool) -> str:
    """Replace the table of a tap whose guest the switch itself holds: what the node takes of what is handed to it.

    The switch floods to the node, too, what goes to a group. With ``in_user_space`` it has read the tap's frames
    before the node's own stack, which must not have them a second time.
    """
    own = [f"ether type arp arp daddr ip {port.node} accept", f"ip saddr {port.local} ip daddr {port.node} accept"]
    head = 'type filter hook ingress device "{}" priority -150; policy {};'
    chains = [
        _chain("from_guest", [*own, "drop"]),
        _chain("node", [f"ether saddr {port.mac} goto from_guest"], head.format(port.bridge, "accept")),
    ]
    if in_user_space:
        chains.append(_chain("ingress", (), head.format(port.device, "drop")))
    return _table("netdev", port.device, chains, present) + _of_own_ports(port, port.bridge, present)


def _of_own_ports(port: Port, device: str, present: Container[str]) -> str:
    """The table that keeps everybody but the guest from the gateways of its mounts: other VMs, networks and users.

    A gateway may have no way to listen at one address only. What comes by the node's own device of the bridge has
    passed the rules of a tap; users of the node come by ``lo``, whatever address they take.
    """
    own = [number for number in port.own_ports if number < FIRST_OPEN]
    if not own:
        return ""
    here = f"tcp dport {{ {', '.join(map(str, own))} }}"
    rules = [f'{here} iifname "{device}" ip saddr {port.local} ip daddr {port.node} accept', f"{here} drop"]
    chain = _chain("own_ports", rules, "type filter hook input priority -200; policy accept;")
    return _table("inet", port.device, [chain], present)


def of_uplink(bridge: str, uplink: str, present: Container[str]) -> str:
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
        present,
    )


def needed(port: Port, families: Sequence[str]) -> list[str]:
    """The names of the tables that a port has: in these families, and for its own ports of the node."""
    guarded = any(number < FIRST_OPEN for number in port.own_ports)
    return names_of(port.device, [*families, *(["inet"] if guarded else [])])


def names_of(device: str, families: Sequence[str]) -> list[str]:
    """The names of a device's tables."""
    return [f"{family} wnodes-{device}" for family in families]


def _table(family: str, device: str, chains: Sequence[str], present: Container[str]) -> str:
    (name,) = names_of(device, [family])
    # A deletion has nft(8) read the rules of all other leases, and the kernel wait: 15 ms and more.
    old = f"delete table {name}\n" if name in present else ""
    return f"{old}table {name} {{\n" + "".join(chains) + "}\n"


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
    # A guest is nobody's DHCP server; clients look at the port that they are sent to, and not all at the other.
    rules += ["udp sport 67 drop", "udp dport 68 drop"]
    rules.append("ip hdrlength > 6 drop")  # options of more than IGMP's four bytes: a route that goes round the law
    own = f"ip saddr {{ {', '.join(four)} }}" if four else "ip protocol 0-255" if bare else ""
    return [*rules, *(f"{own} {place} accept" for place in _reach(port, "ip") if own)]


def _ip6(port: Port, six: Sequence[str]) -> list[str]:
    addresses = [*six, link_local6(port.mac)]
    own = f"ip6 saddr {{ {', '.join(addresses)} }}"
    targets = [f"{_ND_TARGET} {int(ipaddress.IPv6Address(each)):#x}" for each in addresses]
    reach = _reach(port, "ip6")
    # RFC 4861, 4.1, 4.2 and 4.5: routers, their words and asking for them; RFC 8415, 7.2: DHCP's ports.
    return [
        # The transport's header must stand in the first piece, or the rules below see none of it; ICMP in pieces
        # could have its second half read from behind the end of the first, and ND may not come so (RFC 6980).
        "frag nexthdr != { tcp, udp } drop",
        "icmpv6 type { nd-router-solicit, nd-router-advert, nd-redirect } drop",
        "udp sport 547 drop",
        "udp dport 546 drop",
        *(_nd(port, 2, f"nd-neighbor-advert {each} {own}") for each in targets),
        *(f"icmpv6 type nd-neighbor-advert ip6 length {_ND_LENGTH} {each} {own} accept" for each in targets),
        *(f"icmpv6 type nd-neighbor-solicit ip6 saddr :: {each} accept" for each in targets),
        *(_nd(port, 1, f"nd-neighbor-solicit {own} {place}") for place in reach),
        *(f"icmpv6 type nd-neighbor-solicit ip6 length {_ND_LENGTH} {own} {place} accept" for place in reach),
        "icmpv6 type { nd-neighbor-advert, nd-neighbor-solicit } drop",
        # A protocol at the end of the headers: of a chain that does not end in the frame there is none.
        *(f"meta l4proto 0-255 {own} {place} accept" for place in reach),
    ]


def _nd(port: Port, kind: int, rule: str) -> str:
    """A rule that lets a message of ND's pass if its only option is the port's own MAC."""
    option = f"{kind:#04x}01{port.mac.replace(':', '')}"
    return f"icmpv6 type {rule} ip6 length {_ND_LENGTH + 8} {_ND_OPTION} {option} accept"


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
    if port.open_ports:
        rules.append(f"{to_us} tcp dport {{ {', '.join(map(str, port.open_ports))} }} accept")
    return [*rules, "drop"]


def link_local6(mac: str) -> str:
    """The link-local IPv6 address that follows from a MAC (RFC 4291, appendix A).

    >>> link_local6("02:00:00:00:00:07")
    'fe80::ff:fe00:7'
    """
    raw = bytearray.fromhex(mac.replace(":", ""))
    raw[0] ^= 2
    return str(ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes(raw[:3]) + b"\xff\xfe" + bytes(raw[3:])))
