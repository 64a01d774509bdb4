"""User-mode networking: the VM's connections are made by QEMU as the job's user. No root, no port.

Nobody can connect to such a VM, and it can reach what its user can reach from the node.
"""

from __future__ import annotations

from wnodes_core.api import Nic, Port, Route, hookimpl

wnodes_api = 1

# What QEMU's own stack has at these places unless told otherwise (qemu(1), -netdev user).
_ADDRESS, _GATEWAY, _DNS = "10.0.2.15/24", "10.0.2.2", "10.0.2.3"


@hookimpl
def wnodes_port_attach(port: Port) -> Nic | None:
    """Nothing is to be made: what there is of this port is a part of QEMU."""
    if port.kind != "user":
        return None
    return Nic(
        "user",
        port.mac,
        addresses=(_ADDRESS,),
        routes=(Route("0.0.0.0/0", _GATEWAY),),
        dns=(_DNS,),
        mtu=port.mtu,
        node=_GATEWAY,
    )


@hookimpl
def wnodes_port_detach(port: Port) -> bool | None:
    """It ended with QEMU."""
    return True if port.kind == "user" else None
