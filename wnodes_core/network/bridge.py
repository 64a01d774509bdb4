"""Linux bridges: one a VLAN, made for its first port and removed with the last; a tap and its rules a lease.

Made in an order without a moment in which a guest could send unfiltered: the tap is down and no bridge's until its
rules are loaded. Names follow from lease and VLAN, so an undo needs no memory of how far a dead wnodesd had come.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from wnodes_core.api import Nic, Port, Route, errors, hookimpl
from wnodes_core.network import filters, names, tables
from wnodes_core.network.links import Link, links
from wnodes_core.tools import run

wnodes_api = 1
_SYSCTL = Path("/proc/sys/net")
# The node is no router between its tenants, has no address there but the one of its guests, and says so.
_SYSCTLS = (
    ("ipv4", "forwarding", "0"),
    ("ipv4", "accept_source_route", "0"),
    ("ipv4", "arp_ignore", "1"),
    ("ipv6", "disable_ipv6", "1"),
)


@hookimpl
def wnodes_port_allot(port: Port, taken: Sequence[Port]) -> Port | None:
    """The tap's name."""
    return names.with_tap(port) if port.kind == "bridge" else None


@hookimpl
def wnodes_port_attach(port: Port) -> Nic | None:
    """Make bridge and tap, or what of them is missing."""
    if port.kind != "bridge":
        return None
    found, bridge = links(), names.bridge(port)
    there = names.check_tap(port, found.get(port.device))
    with errors_told(port):
        whole = bool(there and found[port.device].master == bridge and _has_rules(port, bridge))
        if not whole:
            if there or not _is_settled(port, bridge, found):
                _make_bridge(port, bridge, found)
            make_tap(port, there)
            _join(port, bridge)
    return nic_of(port, names.bridge_mac(bridge))


@hookimpl
def wnodes_port_detach(port: Port) -> bool | None:
    """Remove the tap, and the bridge if it was the last one's."""
    if port.kind != "bridge":
        return None
    found, bridge = links(), names.bridge(port)
    tables.remove(filters.names_of(port.device, ("netdev", "bridge", "inet")))
    if is_ours(port, found.get(port.device)):
        ip([f"link del dev {port.device}"])
    users = [each for each in found.values() if each.master == bridge and each.name != port.device]
    if any(each.name.startswith("wnt") for each in users):
        ip([f"route del {port.local}/32 dev {bridge}", f"neigh del {port.local} dev {bridge}"], force=True)
    else:
        _remove_bridge(port, bridge, found)
    if is_ours(port, links().get(port.device)):
        raise errors.HostError(f"network {port.network!r}: tap {port.device} does not go away")
    return True


def is_ours(port: Port, found: Link | None) -> bool:
    """Whether a port's tap is there; another's device of that name is none of our business."""
    try:
        return names.check_tap(port, found)
    except errors.TransientError:
        return False


class errors_told:
    """Whatever a program complained of is told as the network's fault, for the job to be tried elsewhere."""

    def __init__(self, port: Port) -> None:
        self._network = port.network

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, errors.CommandError):
            raise errors.TransientError(f"network {self._network!r}: {error.message}") from error


def _has_rules(port: Port, bridge: str) -> bool:
    wanted = {*filters.needed(port, ("netdev", "bridge"))}
    if _outer(port):
        wanted.update(filters.names_of(bridge, ["bridge"]))
    return wanted <= tables.tables()


def _is_settled(port: Port, bridge: str, found: dict[str, Link]) -> bool:
    """Whether the bridge was made to its end: its mark is set last."""
    outer = _outer(port)
    return (
        bridge in found
        and bool(found[bridge].alias)
        and (not outer or outer in found and found[outer].master == bridge)
    )


def _make_bridge(port: Port, bridge: str, found: dict[str, Link]) -> None:
    outer = _outer(port)
    if port.uplink and port.uplink not in found:
        raise errors.TransientError(f"network {port.network!r}: this node has no device {port.uplink!r}")
    if bridge not in found:
        mac = names.bridge_mac(bridge)
        ip([f"link add name {bridge} address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"])
    settle_in(bridge)
    if outer:
        _join_uplink(port, bridge, outer, found)
    address = f"addr replace {port.node}/32 dev {bridge} scope link"
    ip([address, f"link set dev {bridge} {_mtu(port)} up", f"link set dev {bridge} alias wnodes:{port.network}"])


def _quieten(device: str) -> None:
    """No IPv6 of the node's own on it: it would speak up in the tenant's network as soon as it is up."""
    with suppress(FileNotFoundError):
        (_SYSCTL / "ipv6/conf" / device / "disable_ipv6").write_text("1")


def settle_in(bridge: str) -> None:
    """Let the node be no more on a new bridge than its guests' neighbour."""
    for family, key, value in _SYSCTLS:
        with suppress(FileNotFoundError):  # a kernel without IPv6
            (_SYSCTL / family / "conf" / bridge / key).write_text(value)


def _join_uplink(port: Port, bridge: str, outer: str, found: dict[str, Link]) -> None:
    nft(filters.of_uplink(bridge, outer, tables.tables()))
    if not port.vlan:
        _check_uplink_is_free(port, bridge, found[outer])
    elif outer not in found:
        ip([f"link add link {port.uplink} name {outer} type vlan id {port.vlan}"])
    if port.vlan:
        _quieten(outer)
    ip([f"link set dev {outer} addrgenmode none master {bridge} up"])


def _outer(port: Port) -> str:
    """The device by which the port's network leaves the node, '' if it does not."""
    return names.sub_interface(port) if port.vlan else port.uplink


def _check_uplink_is_free(port: Port, bridge: str, uplink: Link) -> None:
    """A device that the node itself talks by would fall silent as a bridge's port."""
    told = json.loads(run(["ip", "-j", "addr", "show", "dev", uplink.name]).stdout)
    own = [each["local"] for link in told for each in link.get("addr_info", ()) if each.get("scope") == "global"]
    if own or uplink.master not in ("", bridge):
        what = f"has the node's own address {own[0]}" if own else f"is a port of {uplink.master}"
        raise errors.TransientError(
            f"network {port.network!r}: uplink {uplink.name} {what}",
            hint="give the network a VLAN or a device of its own",
        )


def make_tap(port: Port, there: bool) -> None:
    """The tap, which only the job's user may open, with its rules and its rate; down, and no bridge's yet."""
    device = port.device
    if not there:
        ip([f"tuntap add dev {device} mode tap user {port.uid}"])
    ip([f"link set dev {device} alias {names.alias(port)}", f"link set dev {device} addrgenmode none {_mtu(port)}"])
    nft(filters.of_tap(port, tables.tables()))
    if port.rate_mbit:
        rate = ["rate", f"{port.rate_mbit}mbit", "burst", f"{max(32, port.rate_mbit * 2)}kb", "latency", "50ms"]
        run(["tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate])


def _join(port: Port, bridge: str) -> None:
    ip([f"link set dev {port.device} master {bridge} up", *way_to(port, bridge)])


def way_to(port: Port, bridge: str) -> list[str]:
    """Lines of ip(8) that give the node its way to a guest: by its MAC, so that nobody need be asked."""
    return [
        f"neigh replace {port.local} lladdr {port.mac} dev {bridge} nud permanent",
        f"route replace {port.local}/32 dev {bridge} src {port.node} scope link",
    ]


def _mtu(port: Port) -> str:
    return f"mtu {port.mtu}" if port.mtu else ""


def _remove_bridge(port: Port, bridge: str, found: dict[str, Link]) -> None:
    outer = _outer(port)
    if port.vlan and outer in found:
        ip([f"link del dev {outer}"], force=True)
    elif outer in found and found[outer].master == bridge:
        ip([f"link set dev {outer} nomaster"], force=True)
    if bridge in found:
        ip([f"link del dev {bridge}"], force=True)
    tables.remove(filters.names_of(bridge, ["bridge"]))
    left = [name for name in (bridge, outer if port.vlan else "") if name and name in links()]
    if left:
        raise errors.HostError(f"network {port.network!r}: {', '.join(left)} does not go away")


def nic_of(port: Port, node_mac: str) -> Nic:
    """What the VM is given: the tap; addresses and routes of the network and of the way to the node."""
    # The link's own addresses come first: the kernel takes the first for what is sent by it.
    routes = [Route("::/0" if ":" in each else "0.0.0.0/0", each) for each in port.gateways]
    routes.append(Route(f"{port.node}/32", "", port.local))
    return Nic(
        "tap",
        port.mac,
        port.device,
        addresses=(*port.addresses, f"{port.local}/32"),
        routes=tuple(routes),
        neighbours=((port.node, node_mac),),
        dns=port.dns,
        mtu=port.mtu,
        node=port.node,
    )


def ip(lines: Sequence[str], *, force: bool = False) -> None:
    """Run lines of ip(8) in one process; with ``force`` go on after errors and raise none. Raises CommandError."""
    argv = ["ip", *(["-force"] if force else []), "-batch", "-"]
    run(argv, stdin="".join(f"{line}\n" for line in lines).encode(), check=not force)


def nft(text: str) -> None:
    """Load rules in one transaction. Raises CommandError."""
    run(["nft", "-f", "-"], stdin=text.encode())
