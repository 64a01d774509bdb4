"""Hooks for networks: what the user asks for becomes a port, made on the node, and a NIC in the VM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wnodes_core.markers import hookspec

if TYPE_CHECKING:
    from wnodes_core.ports import Nic, Port


@hookspec(firstresult=True)
def wnodes_port_allot(port: Port, taken: Sequence[Port]) -> Port | None:
    """Called in wnodesd before a port is made: choose what only its provider knows, the device. No effect yet.

    :param port: addresses, MAC and VLAN are chosen.
    :param taken: the ports that leases of this node have.
    :returns: the port with its device, None if the network's kind is another provider's, or the keeper's.
    :raises HostBusy: no device is free.
    """


@hookspec(firstresult=True)
def wnodes_port_attach(port: Port) -> Nic | None:
    """Called to make a port: by wnodesd as root before the VM starts, or in the keeper as the job's user.

    The keeper's plug-ins are asked for what wnodesd's allot nothing for, once the guest answers. Called
    again for a port that exists, after a restart or when something of it was lost: make what is missing,
    return the same.

    :param port: everything was decided before, addresses and device names too, and is in the journal.
    :returns: what the VM is to be given, None if the network's kind is another provider's.
    :raises TransientError: it cannot be had on this node now.
    """


@hookspec(firstresult=True)
def wnodes_port_detach(port: Port) -> bool | None:
    """Called to remove a port where it was made; idempotent, also for one that was only half made.

    :param port: as given to ``wnodes_port_attach``; that call may never have returned.
    :returns: True when nothing of it is left, None if it is another provider's.
    """
