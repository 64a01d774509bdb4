"""The nouns of networks: a port that a lease's VM gets in a network, the NIC that the VM has there.

Frozen, typed, no I/O. Units stand in the names (``rate_mbit``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Port:
    """One lease's place in a network, with all that was decided on it before anything was made.

    ``device`` is the tap's name, or a PCI address that one of ``devices`` (patterns) matches. ``addresses``
    carry their prefix lengths, IPv4 first.
    ``closed``: the VM talks to its own network and ``allow`` only. ``node`` and ``local`` are the two ends
    of the way between the node and the VM that never leaves the machine; ``node_ports`` are the TCP ports of
    the node that the VM may use on it, ``own_ports`` those that only this VM may use, and nobody else at all.
    ``rate_mbit`` 0 = unlimited, ``mtu`` 0 = the network's own.
    """

    lease: str
    network: str
    kind: str
    uid: int = 0
    device: str = ""
    mac: str = ""
    vlan: int = 0
    uplink: str = ""
    bridge: str = ""
    datapath: str = ""
    devices: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    closed: bool = False
    allow: tuple[str, ...] = ()
    node: str = ""
    local: str = ""
    node_ports: tuple[int, ...] = ()
    own_ports: tuple[int, ...] = ()
    rate_mbit: int = 0
    mtu: int = 0

    @property
    def open_ports(self) -> tuple[int, ...]:
        """All TCP ports of the node that the VM may use."""
        return (*self.node_ports, *self.own_ports)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Port:
        """Back from ``to_dict``, also through JSON."""
        plain: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in data.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Route:
    """``to`` (a prefix) by way of ``via`` ('' = on the link itself), leaving from ``source``."""

    to: str
    via: str = ""
    source: str = ""


@dataclass(frozen=True)
class Nic:
    """What is plugged into the running VM, and what its guest is told of it.

    ``kind``: ``user`` (QEMU's own network stack), ``tap`` (``device`` is there, ours to open) or
    ``pci`` (``device`` is a PCI address, ours to open). ``neighbours`` are (address, MAC) pairs the guest need
    not ask for. ``node`` is the node's own address on this network, '' if it has none for the VM.
    ``offload`` False: checksums are the guest's own work, for what takes its frames completes none.
    """

    kind: str
    mac: str = ""
    device: str = ""
    addresses: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    dns: tuple[str, ...] = ()
    mtu: int = 0
    node: str = ""
    offload: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Nic:
        """Back from ``to_dict``, also through JSON."""
        lists = {key: tuple(data[key]) for key in ("addresses", "dns")}
        neighbours = tuple((pair[0], pair[1]) for pair in data["neighbours"])
        return cls(**{**data, **lists, "neighbours": neighbours, "routes": tuple(Route(**r) for r in data["routes"])})


def mac_of(*words: str) -> str:
    """A MAC of our own making (locally administered, unicast), the same for the same words.

    40 bits of a digest: among 100,000 VMs of a site two share one with a chance of 1 in 200.

    >>> mac_of("node1", "slurm-n0-12-ab12cd")[:3]
    '02:'
    """
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])
