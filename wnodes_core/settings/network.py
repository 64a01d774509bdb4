"""The section ``network``: the networks of the site, as far as this node may carry them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from wnodes_core.ports import Port, mac_of
from wnodes_core.settings import values
from wnodes_core.settings.fields import setting

BUILT_IN = ("none", "user")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}\Z")  # IFNAMSIZ is 16 with its NUL
_VLAN = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?\Z")
_PCI = re.compile(r"[0-9a-f*?\[\]:.!-]{1,32}\Z")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def word(text: str) -> str:
    """A network's name."""
    if not _NAME.match(text) or text in BUILT_IN:
        raise ValueError("want letters, digits, '.', '_' and '-', at most 32, and not none or user")
    return text


def device(text: str) -> str:
    """A network device's name."""
    if not _DEVICE.match(text):
        raise ValueError("want the name of a network device, at most 15 letters, digits, '.', '_' and '-'")
    return text


def vlan(text: str) -> str:
    """A VLAN's number, or a span of them."""
    found = _VLAN.match(text)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]) <= 4094:
        raise ValueError("want a VLAN from 1 to 4094, or a span as in 100-199")
    return text


def pci(text: str) -> str:
    """A pattern of PCI addresses."""
    if not _PCI.match(text.lower()):
        raise ValueError("want a PCI address or pattern, as in 0000:3b:02.*")
    return text.lower()


def prefix(text: str) -> str:
    """An address with its prefix length, no host bits set."""
    return str(ipaddress.ip_network(text))


def address(text: str) -> str:
    """An IPv4 or IPv6 address."""
    return str(ipaddress.ip_address(text))


def span(text: str) -> str:
    """Addresses of the node: a prefix, or FIRST-LAST."""
    span_of(text)
    return text


def span_of(text: str) -> tuple[Address, Address]:
    """First and last address of a span; of an IPv4 prefix all but its first and last. Raises ValueError."""
    first, dash, last = text.partition("-")
    if dash:
        ends = ipaddress.ip_address(first.strip()), ipaddress.ip_address(last.strip())
        if ends[0].version != ends[1].version or int(ends[0]) > int(ends[1]):
            raise ValueError("want FIRST-LAST, both of one family, the lower one first")
        return ends
    network = ipaddress.ip_network(text)
    spare = int(network.num_addresses > 2)
    return network[spare], network[-1 - spare]


def tcp_port(text: str) -> int:
    """A TCP port."""
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError("want a TCP port from 1 to 65535")
    return int(text)


def port_span(text: str) -> str:
    """TCP ports that only root may open, FIRST-LAST."""
    found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if not found or not 0 < int(found[1]) <= int(found[2]) < 1024:
        raise ValueError("want FIRST-LAST, ports from 1 to 1023")
    return text


def node_prefix(text: str) -> str:
    """A prefix within 169.254.0.0/16, which no router ever forwards (RFC 3927, 2.7)."""
    found = ipaddress.ip_network(text)
    if not isinstance(found, ipaddress.IPv4Network) or not found.subnet_of(ipaddress.IPv4Network("169.254.0.0/16")):
        raise ValueError("want a prefix within 169.254.0.0/16")
    return str(found)


@dataclass(frozen=True)
class NetworkRule:
    """One network that VMs may ask for by its name, and that rules of the policy may allow or give.

    A node that ``nodes`` does not name never advertises it and refuses it, so one file can serve a whole
    site; ``range`` is the node's own and belongs in a file of the node.
    """

    name: str = setting("", "What a request calls it.", word, example="cms-lan")
    kind: str = setting(
        "bridge", "bridge (Linux bridge), ovs (Open vSwitch), pci (a device of the host), or a plug-in's word.", word
    )
    nodes: tuple[str, ...] = setting((), "Nodes that carry it, or patterns; empty = all.", example=["wn1*"])
    uplink: str = setting("", "The device that it leaves the node by; none = it does not.", device, example="eth1")
    vlan: str = setting("", "Its VLAN there; a span gives each lease a VLAN of its own.", vlan, example="42")
    bridge: str = setting(
        "",
        "The bridge of kind ovs; if it is not there, made for the first and removed with the last VM.",
        device,
        example="wn-br",
    )
    datapath: str = setting(
        "system",
        "Datapath of such a bridge that we make: system (the kernel's) or netdev (user space).",
        values.choice("system", "netdev"),
    )
    devices: tuple[str, ...] = setting(
        (),
        "PCI addresses or patterns of kind pci. Not given, all virtual functions of the uplink.",
        pci,
        example=["0000:3b:02.*"],
    )
    range: tuple[str, ...] = setting(
        (), "Addresses that this node may give: prefix or FIRST-LAST, one a family.", span, example=["10.42.7.0/26"]
    )
    subnet: tuple[str, ...] = setting(
        (), "The prefixes of the whole network, one a family.", prefix, example=["10.42.0.0/16"]
    )
    gateway: tuple[str, ...] = setting((), "Its routers, one a family.", address, example=["10.42.0.1"])
    dns: tuple[str, ...] = setting((), "Its name servers.", address, example=["10.42.0.2"])
    access: str = setting(
        "open",
        "A VM may talk to everybody (open), or only within the network, to its node and to `allow` (closed).",
        values.choice("open", "closed"),
    )
    allow: tuple[str, ...] = setting((), "What a closed network's VMs may talk to besides.", prefix)
    rate_mbit: int = setting(0, "The most Mbit/s of one VM, each way; 0 = no limit.", values.whole)
    mtu: int = setting(0, "Largest packet; 0 = the devices' default.", values.whole)

    def __post_init__(self) -> None:
        if not self.name:
            return  # the defaults themselves
        if self.kind == "bridge" and self.vlan and not self.uplink:
            raise ValueError(f"network {self.name}: a VLAN wants an uplink")
        if self.kind == "ovs" and not self.bridge:
            raise ValueError(f"network {self.name}: kind ovs wants a bridge")
        if self.kind == "pci" and not (self.devices or self.uplink):
            raise ValueError(f"network {self.name}: kind pci wants devices, or an uplink with virtual functions")
        for what, given in (("range", self.range), ("subnet", self.subnet), ("gateway", self.gateway)):
            families = [":" in each for each in given]
            if len(set(families)) != len(families):
                raise ValueError(f"network {self.name}: want one {what} a family")
        subnets = [ipaddress.ip_network(each) for each in self.subnet]
        inner = [end for each in self.range for end in span_of(each)]
        inner += [ipaddress.ip_address(each) for each in self.gateway]
        for each in inner:
            if not any(each in subnet for subnet in subnets):
                raise ValueError(f"network {self.name}: {each} is in none of its subnets")

    @property
    def vlans(self) -> tuple[int, ...]:
        """Its VLANs; none is (0,)."""
        found = _VLAN.match(self.vlan)
        return tuple(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else (0,)

    def carried_by(self, node: str) -> bool:
        """Whether the site confines it to nodes that this one is among."""
        return not self.nodes or any(fnmatchcase(node, pattern) for pattern in self.nodes)


@dataclass(frozen=True)
class NetworkSettings:
    """Networks that VMs of this node may be in, besides ``none`` (the default) and ``user``.

    A VM and its own node talk over ``node_address`` and an address of ``node_range``, in every network of kind
    bridge or ovs. That traffic never leaves the machine, so all nodes may have the same.
    """

    node_address: str = setting("169.254.77.1", "The node, as its own VMs know it.", address, node_only=True)
    node_range: str = setting(
        "169.254.80.0/20", "Where its VMs get their addresses towards it from.", node_prefix, node_only=True
    )
    node_ports: tuple[int, ...] = setting(
        (), "TCP ports of the node that its VMs may use at that address.", tcp_port, node_only=True, example=[2049]
    )
    gateway_ports: str = setting(
        "256-343",
        "TCP ports of the node that NFS gateways listen on, one a mount; each is for one VM only.",
        port_span,
        node_only=True,
    )
    networks: tuple[NetworkRule, ...] = setting((), "The site's networks.", node_only=True)

    def __post_init__(self) -> None:
        names = [each.name for each in self.networks]
        for each in names:
            if not each:
                raise ValueError("a network without a name: want name: WORD")
            if names.count(each) > 1:
                raise ValueError(f"network {each} is there twice")
        if ipaddress.ip_address(self.node_address) in ipaddress.ip_network(self.node_range):
            raise ValueError(f"node_address {self.node_address} is one of node_range {self.node_range}")

    def find(self, wanted: str) -> NetworkRule | None:
        """The network of that name."""
        return next((each for each in self.networks if each.name == wanted), None)

    def port_for(self, wanted: str, rate_mbit: int | None, lease: str, uid: int) -> Port | None:
        """The port of an admitted request, None for none; what wnodesd allots is not in it yet."""
        if wanted in ("", "none"):
            return None
        mac = mac_of(lease, wanted)
        network = self.find(wanted)
        if network is None:  # ``user``, or a plug-in's own
            return Port(lease, wanted, wanted, uid, mac=mac)
        return Port(
            lease=lease,
            network=wanted,
            kind=network.kind,
            uid=uid,
            mac=mac,
            uplink=network.uplink,
            bridge=network.bridge,
            datapath=network.datapath,
            devices=network.devices,
            gateways=network.gateway,
            dns=network.dns,
            closed=network.access == "closed",
            allow=(*network.subnet, *network.allow),
            rate_mbit=rate_mbit or network.rate_mbit,
            mtu=network.mtu,
        )

    def here(self, node: str) -> tuple[str, ...]:
        """Names of the networks that this node carries."""
        return tuple(each.name for each in self.networks if each.carried_by(node))
