"""Open vSwitch: an access port of the lease's VLAN on the site's bridge, or on one that is made for the first port.

The switch itself holds the guest to its addresses (``flows``). A port is added while its tap is down, and the tap
comes up once the rules are in: there is no moment in which a guest could send unfiltered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wnodes_core.api import Nic, Port, errors, hookimpl
from wnodes_core.network import bridge, filters, flows, names, tables
from wnodes_core.network.links import links
from wnodes_core.tools import Result, clean_environment, run

wnodes_api = 1
_TIMEOUT_S = 10
_OURS = "external_ids:wnodes"
# VLAN of the node's own end of a bridge that we made: no tenant's, so nothing is switched to the node.
_NOBODY_S_VLAN = 4094


@hookimpl
def wnodes_port_allot(port: Port, taken: Sequence[Port]) -> Port | None:
    """The tap's name."""
    return names.with_tap(port) if port.kind == "ovs" else None


@hookimpl
def wnodes_port_attach(port: Port) -> Nic | None:
    """Make bridge, tap, port and rules, or what of them is missing."""
    if port.kind != "ovs":
        return None
    there = names.check_tap(port, links().get(port.device))
    with bridge.errors_told(port):
        found = _bridge(port)
        if not found:
            _make_bridge(port)
            found = _bridge(port)
        elif there and _is_whole(port):
            return _nic(port, found)
        if not there:
            _make_tap(port)
        # A switch in user space reads a copy: the kernel goes on to answer the guest's ARP, and more, by itself.
        bridge.nft(filters.of_switched_tap(port, tables.tables(), in_user_space=_in_user_space(found)))
        number = _add_port(port)
        _load_rules(port, number, links()[port.bridge].mac, ours=_is_ours(found))
        _open(port)
    return _nic(port, found)


@hookimpl
def wnodes_port_detach(port: Port) -> bool | None:
    """Remove tap, port and rules, and a bridge of ours if it was the last one's."""
    if port.kind != "ovs":
        return None
    if bridge.is_ours(port, links().get(port.device)):
        bridge.ip([f"link del dev {port.device}"])  # from here on the guest is alone
    tables.remove(filters.names_of(port.device, ["netdev", "inet"]))
    with bridge.errors_told(port):
        if _bridge(port):
            _remove_port(port)
    if bridge.is_ours(port, links().get(port.device)):
        raise errors.HostError(f"network {port.network!r}: tap {port.device} does not go away")
    return True


@dataclass(frozen=True)
class _Rate:
    """A limit as Open vSwitch counts: what the guest sends by a meter, what it gets by a queue of its port."""

    kbit: int
    burst_kbit: int


def _rate(port: Port) -> _Rate:
    return _Rate(port.rate_mbit * 1000, max(512, port.rate_mbit * 20))


def _bridge(port: Port) -> str:
    """Datapath and marks of the port's bridge, '' if there is none. Raises TransientError."""
    done = _vsctl("--if-exists", "get", "bridge", port.bridge, "datapath_type", "external_ids", check=False)
    if done.exit_code:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise errors.TransientError(f"network {port.network!r}: Open vSwitch does not answer: {said}")
    return done.text.strip()


def _in_user_space(found: str) -> bool:
    return "netdev" in found.splitlines()[0]


def _nic(port: Port, found: str) -> Nic:
    """Such a switch passes on what it has read from the tap, checksums that are still to be made included."""
    nic = bridge.nic_of(port, links()[port.bridge].mac)
    return replace(nic, offload=not _in_user_space(found))


def _is_whole(port: Port) -> bool:
    """Whether the port is in its bridge with all of its rules, which is what the sweeper asks again and again."""
    if _vsctl("port-to-br", port.device, check=False).text.strip() != port.bridge:
        return False
    if not tables.tables().issuperset(filters.needed(port, ["netdev"])):
        return False
    told = _ofctl("dump-flows", port.bridge, f"cookie={flows.cookie(port.lease):#x}/-1").text
    return told.count("cookie=") == len(flows.of_port(port, 1, "", 0))


def _make_bridge(port: Port) -> None:
    if port.uplink and port.uplink not in links():
        raise errors.TransientError(f"network {port.network!r}: this node has no device {port.uplink!r}")
    mac = names.bridge_mac(port.bridge)
    uplink = ["--", "add-port", port.bridge, port.uplink] if port.uplink else []
    _vsctl(
        *("add-br", port.bridge, "--", "set", "bridge", port.bridge, f"datapath_type={port.datapath}"),
        *(
            f"other_config:hwaddr={mac}",
            f"{_OURS}=yes",
            "fail_mode=secure",
            "--",
            "set",
            "port",
            port.bridge,
            f"tag={_NOBODY_S_VLAN}",
        ),
        *uplink,
    )
    bridge.settle_in(port.bridge)


def _make_tap(port: Port) -> None:
    mark = f"link set dev {port.device} alias {names.alias(port)}"
    mtu = f"mtu {port.mtu}" if port.mtu else ""
    bridge.ip([f"tuntap add dev {port.device} mode tap user {port.uid}"])
    bridge.ip([mark, f"link set dev {port.device} addrgenmode none {mtu}"])


def _add_port(port: Port) -> int:
    """Add the port if need be; its OpenFlow number. A tag of 0 is the untagged network, and no trunk."""
    words = ["--may-exist", "add-port", port.bridge, port.device]
    words += ["--", "set", "port", port.device, f"tag={port.vlan}", "vlan_mode=access", f"{_OURS}={port.lease}"]
    if port.rate_mbit:
        rate = f"other_config:max-rate={_rate(port).kbit * 1000}"
        _vsctl("--if-exists", "clear", "port", port.device, "qos")
        _destroy_queue(port)
        words += ["qos=@rate", "--", "--id=@rate", "create", "qos", "type=linux-htb", rate, f"{_OURS}={port.lease}"]
    _vsctl(*words)
    told = _vsctl("get", "interface", port.device, "ofport").text.strip()
    if not told.isdigit():
        raise errors.TransientError(
            f"network {port.network!r}: Open vSwitch does not take {port.device}: ofport {told}"
        )
    return int(told)


def _is_ours(external_ids: str) -> bool:
    return "wnodes=" in external_ids


def _load_rules(port: Port, number: int, node_mac: str, *, ours: bool) -> None:
    meter = number if port.rate_mbit else 0
    if meter:
        rate = _rate(port)
        band = f"band=type=drop,rate={rate.kbit},burst_size={rate.burst_kbit}"
        _ofctl("del-meter", port.bridge, f"meter={meter}")
        _ofctl("add-meter", port.bridge, f"meter={meter},kbps,burst,{band}")
    lines = [f"delete cookie={flows.cookie(port.lease):#x}/-1", *(f"add {rule}" for rule in flows.of_bridge(ours=ours))]
    lines += [f"add {rule}" for rule in flows.of_port(port, number, node_mac, meter)]
    # One transaction: an old rule never goes before its successor is there.
    _ofctl("--bundle", "add-flows", port.bridge, "-", stdin="".join(f"{line}\n" for line in lines))


def _open(port: Port) -> None:
    """The node's end of the way to its guests; then the tap, which lets the guest speak."""
    bridge.ip(
        [
            f"addr replace {port.node}/32 dev {port.bridge} scope link",
            f"link set dev {port.bridge} up",
            *bridge.way_to(port, port.bridge),
            f"link set dev {port.device} up",
        ]
    )


def _remove_port(port: Port) -> None:
    number = _vsctl("--if-exists", "get", "interface", port.device, "ofport").text.strip()
    _vsctl("--if-exists", "del-port", port.bridge, port.device)
    _destroy_queue(port)
    if number.isdigit() and port.rate_mbit:
        _ofctl("del-meter", port.bridge, f"meter={number}")
    left = [name for name in _vsctl("list-ports", port.bridge).text.split() if name.startswith("wnt")]
    if not left and _is_ours(_vsctl("--if-exists", "get", "bridge", port.bridge, "external_ids").text):
        _vsctl("--if-exists", "del-br", port.bridge)
        return
    _ofctl("del-flows", port.bridge, f"cookie={flows.cookie(port.lease):#x}/-1")
    lines = [f"route del {port.local}/32 dev {port.bridge}", f"neigh del {port.local} dev {port.bridge}"]
    if not left:  # the site's own bridge is as it was
        _ofctl("del-flows", port.bridge, f"cookie={flows.NODE_COOKIE:#x}/-1")
        lines.append(f"addr del {port.node}/32 dev {port.bridge}")
    bridge.ip(lines, force=True)


def _destroy_queue(port: Port) -> None:
    for uuid in _vsctl("--bare", "--columns=_uuid", "find", "qos", f"{_OURS}={port.lease}").text.split():
        _vsctl("--if-exists", "destroy", "qos", uuid)


def _environ() -> dict[str, str]:
    return clean_environment([name for name in os.environ if name in ("OVS_RUNDIR", "OVS_DBDIR")])


def _vsctl(*words: str, check: bool = True) -> Result:
    argv = ["ovs-vsctl", f"--timeout={_TIMEOUT_S}", *words]
    return run(argv, environ=_environ(), check=check, timeout_s=_TIMEOUT_S + 5)


def _ofctl(*words: str, stdin: str = "") -> Result:
    argv = ["ovs-ofctl", f"--timeout={_TIMEOUT_S}", "--protocols=OpenFlow14", *words]
    return run(argv, stdin=stdin.encode(), environ=_environ(), timeout_s=_TIMEOUT_S + 5)
