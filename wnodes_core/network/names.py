"""The names of what providers make, so that an undo finds it by name alone, and whether it is ours."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import replace

from wnodes_core.api import Port, errors, mac_of
from wnodes_core.network.links import Link

LINK_LOCAL = "169.254.0.0/16"
FIRST_OPEN = 1024  # TCP ports below are root's to open (ip(7), ip_unprivileged_port_start)


def tap(lease: str) -> str:
    """A lease's tap: ``wnt`` and eight digits that follow from the lease (a device's name has 15 at most)."""
    return "wnt" + hashlib.sha256(lease.encode()).hexdigest()[:8]


def bridge(port: Port) -> str:
    """The Linux bridge of a port's VLAN on its uplink, as in ``wnb0042e5a1``."""
    return "wnb" + _place(port)


def sub_interface(port: Port) -> str:
    """The uplink's device for a port's VLAN."""
    return "wnv" + _place(port)


def _place(port: Port) -> str:
    where = port.uplink or "/" + port.network  # without an uplink each network is alone
    return f"{port.vlan:04d}{hashlib.sha256(where.encode()).hexdigest()[:4]}"


def bridge_mac(device: str) -> str:
    """The MAC that the node has on a bridge of ours: its guests are told it."""
    return mac_of(socket.gethostname(), device)


def alias(port: Port) -> str:
    """What a lease's tap is marked with."""
    return f"wnodes:{port.lease}"


def check_tap(port: Port, found: Link | None) -> bool:
    """Whether the port's tap is there. One without a mark is ours too: we died before we had marked it.

    Raises TransientError for another's device of that name.
    """
    if found is None:
        return False
    if found.kind != "tun" or found.alias not in ("", alias(port)):
        shown = found.alias or found.kind or "unmarked"
        raise errors.TransientError(
            f"network {port.network!r}: the name {port.device} is taken on this node by another device ({shown})"
        )
    return True


def with_tap(port: Port) -> Port:
    """The port with its tap's name."""
    return replace(port, device=tap(port.lease))
