"""Linux bridges for real: two worker nodes, three networks, guests that send what they must not.

The test itself plays the guests (it holds the taps) and the site (it holds the far ends of the cables).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Nic, Port, errors, mac_of
from wnodes_core.network import bridge, names, tables
from wnodes_core.network.links import links
from wnodes_core.tools import run

sys.path.insert(0, str(Path(__file__).parent))
from netns_kit import BROADCAST, Namespace, Seen, Wiretap, arp, came, ping, tcp, udp, veth  # noqa: E402
from network_kit import NODE, Vm, outside  # noqa: E402

pytestmark = pytest.mark.net
SITE_MAC = "06:00:00:00:00:01"
NETWORKS = ("a", "b", "c")


class Node:
    """A worker node with a cable for each network; ``wire`` is where the cables end."""

    def __init__(self, wire: Namespace, number: int) -> None:
        self.space, self.wire, self.number = Namespace(), wire, number
        for name in NETWORKS:
            veth(self.space, f"up-{name}", wire, f"n{number}{name}")
            self.space.quiet(f"up-{name}")
            wire.sh("ip", "link", "set", f"n{number}{name}", "master", f"net-{name}")

    def port(self, lease: str, network: str = "a", host: int = 10, **more: Any) -> Port:
        subnet = NETWORKS.index(network) + 1
        port = Port(
            lease=f"{lease}@{self.number}", network=network, kind="bridge", uid=12345, uplink=f"up-{network}",
            addresses=(f"10.{subnet}.{self.number}.{host}/16",), gateways=(f"10.{subnet}.0.1",), node=NODE,
            local=f"169.254.80.{host}", mac=mac_of(lease, network, str(self.number)), allow=(f"10.{subnet}.0.0/16",),
        )  # fmt: skip
        return replace(names.with_tap(port), **more)

    def cable(self, network: str) -> str:
        """The far end of a network's cable."""
        return f"n{self.number}{network}"

    def attach(self, port: Port) -> Nic:
        return self.space.run(bridge.wnodes_port_attach, port)

    def detach(self, port: Port) -> bool:
        return self.space.run(bridge.wnodes_port_detach, port)

    def left(self) -> list[str]:
        """What of ours is there: devices, rules, addresses, routes."""
        found = [name for name in self.space.run(links) if name.startswith(("wnt", "wnb", "wnv"))]
        found += self.space.sh("nft", "list", "tables").split("\n")[:-1]
        found += [line for line in self.space.sh("ip", "route", "show", "table", "all").split("\n") if "169.254" in line]
        found += [name for name, each in self.space.run(links).items() if each.master]
        return found


@pytest.fixture(scope="module")
def wire() -> Iterator[Namespace]:
    """The site: a switch for each network."""
    space = Namespace()
    space.quiet("all", "default")
    for name in NETWORKS:
        space.sh("ip", "link", "add", f"net-{name}", "type", "bridge", "mcast_snooping", "0")
        space.sh("ip", "link", "set", f"net-{name}", "addrgenmode", "none", "up")
        # A host of the site, as a pair of ends: what is sent into one comes out of the switch.
        space.sh("ip", "link", "add", f"site-{name}", "type", "veth", "peer", "name", f"s-{name}")
        space.sh("ip", "link", "set", f"s-{name}", "addrgenmode", "none", "master", f"net-{name}", "addrgenmode", "none", "up")
        space.sh("ip", "link", "set", f"site-{name}", "addrgenmode", "none", "up")
    yield space
    space.close()


@pytest.fixture(scope="module")
def nodes(wire: Namespace) -> Iterator[tuple[Node, Node]]:
    made = Node(wire, 1), Node(wire, 2)
    yield made
    for node in made:
        node.space.close()


@pytest.fixture
def node(nodes: tuple[Node, Node]) -> Iterator[Node]:
    yield nodes[0]
    assert nodes[0].left() == []


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def test_the_nic_that_the_vm_is_given(node: Node, stack: contextlib.ExitStack) -> None:
    vm = Vm(stack, node)
    assert vm.nic.kind == "tap"
    assert vm.nic.addresses == ("10.1.1.10/16", "169.254.80.10/32")
    assert [(route.to, route.via, route.source) for route in vm.nic.routes] == [
        ("0.0.0.0/0", "10.1.0.1", ""), (f"{NODE}/32", "", "169.254.80.10"),
    ]  # fmt: skip
    assert node.attach(vm.port) == vm.nic  # asked again, nothing changes


def test_vms_of_one_network_meet_on_one_node_and_across_two(nodes: Any, node: Node, stack: contextlib.ExitStack) -> None:
    one, near, far = Vm(stack, node, "one"), Vm(stack, node, "two", host=11), Vm(stack, nodes[1], "one")
    other = Vm(stack, nodes[1], "other", "b")
    frame = one.udp(far.ip)
    one.tap.send(frame)
    assert came(near.tap.frames(), frame)
    assert came(far.tap.frames(), frame)
    assert other.tap.frames() == []


def test_the_way_to_the_node_never_leaves_the_machine(nodes: Any, node: Node, stack: contextlib.ExitStack) -> None:
    vm, near = Vm(stack, node, "one", node_ports=(2049,)), Vm(stack, node, "two", host=11)
    wire = outside(stack, node)
    vm.tap.send(arp(vm.mac, vm.port.local, NODE))
    (answer,) = [Seen.of(frame) for frame in vm.tap.frames() if Seen.of(frame).kind == 0x806]
    assert answer.source == vm.node_mac
    vm.tap.send(ping(vm.mac, vm.node_mac, vm.port.local, NODE))
    (echo,) = [Seen.of(frame) for frame in vm.tap.frames() if Seen.of(frame).kind == 0x800]
    assert (echo.source, echo.body[12:16], echo.body[20]) == (vm.node_mac, socket.inet_aton(NODE), 0)
    # The node begins, to a guest that has never said a word: it knows the MAC, nobody is asked.
    node.space.sh("ping", "-c1", "-W", "0.2", near.port.local, check=False)
    (asked,) = [Seen.of(frame) for frame in near.tap.frames() if Seen.of(frame).body[20:21] == b"\x08"]
    assert (asked.source, asked.target) == (near.node_mac, near.mac)
    # Whatever MAC a guest sends it to: the uplink drops what is of that address space.
    for target in (BROADCAST, "02:00:00:00:00:99"):
        vm.tap.send(ping(vm.mac, target, vm.port.local, NODE))
    assert wire.frames() == []
    vm.tap.frames()  # the node's answer to what it was broadcast
    # And from outside, nobody is a node.
    site = Wiretap(node.wire, "site-a")
    stack.callback(site.close)
    site.send(arp(SITE_MAC, NODE, vm.port.local))
    site.send(udp(SITE_MAC, vm.mac, NODE, vm.port.local))
    site.send(udp(SITE_MAC, vm.mac, "10.1.0.1", vm.ip))
    assert [Seen.of(frame).body[12:16] for frame in vm.tap.frames() if Seen.of(frame).kind == 0x800] == [socket.inet_aton("10.1.0.1")]


def test_of_the_node_a_guest_reaches_the_ports_that_the_site_names(node: Node, stack: contextlib.ExitStack) -> None:
    vm = Vm(stack, node, node_ports=(2049,))

    def flags_for(port: int, address: str = NODE, sender: str = "") -> list[int]:
        vm.tap.send(tcp(vm.mac, vm.node_mac, sender or vm.port.local, address, port))
        return [frame[47] for frame in vm.tap.frames(0.05) if Seen.of(frame).kind == 0x800]

    def serve() -> list[socket.socket]:
        return [socket.create_server(("0.0.0.0", port)) for port in (2049, 22)]  # noqa: S104 - a namespace of the test's

    for server in node.space.run(serve):
        stack.callback(server.close)
    node.space.sh("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
    stack.callback(node.space.sh, "ip", "addr", "del", "192.0.2.1/32", "dev", "lo")
    node.space.sh("sysctl", "-qw", "net.ipv4.ip_forward=1")
    assert flags_for(2049) == [0x12]
    assert flags_for(22) == []
    assert flags_for(2049, "192.0.2.1") == []  # the node by another of its names
    assert flags_for(2049, "192.0.2.1", vm.ip) == []


def test_the_node_is_no_router_between_networks(node: Node, stack: contextlib.ExitStack) -> None:
    one, other = Vm(stack, node, "one", "a"), Vm(stack, node, "two", "b", host=11)
    node.space.sh("sysctl", "-qw", "net.ipv4.ip_forward=1")
    node.space.sh("ip", "route", "add", "10.2.0.0/16", "dev", names.bridge(other.port))
    for target in (other.port.local, other.ip):
        one.tap.send(udp(one.mac, one.node_mac, one.ip, target))
        one.tap.send(udp(one.mac, one.node_mac, one.port.local, target))
    assert [Seen.of(frame) for frame in other.tap.frames() if Seen.of(frame).kind == 0x800] == []


def test_a_rate_holds_both_ways(node: Node, stack: contextlib.ExitStack) -> None:
    vm = Vm(stack, node, rate_mbit=8)
    wire, site = outside(stack, node), Wiretap(node.wire, "site-a")
    stack.callback(site.close)
    sent = 400
    for _ in range(sent):
        vm.tap.send(vm.udp("10.1.0.1", text=bytes(1400)))
        site.send(udp(SITE_MAC, vm.mac, "10.1.0.1", vm.ip, text=bytes(1400)))
    out = sum(len(frame) for frame in wire.frames() if Seen.of(frame).source == vm.mac)
    back = sum(len(frame) for frame in vm.tap.frames())
    # 8 Mbit/s are 1 MB/s: 580 kB at once are cut to what the burst and the moment let through.
    assert 20_000 < out < 300_000
    assert 20_000 < back < 300_000


def test_an_uplink_that_is_missing_or_the_node_s_own_is_refused(node: Node) -> None:
    missing = node.port("one", uplink="up-z")
    with pytest.raises(errors.TransientError, match="network 'a': this node has no device 'up-z'"):
        node.attach(missing)
    assert node.detach(missing) is True
    own = node.port("one")
    node.space.sh("ip", "addr", "add", "192.0.2.7/24", "dev", "up-a")
    with pytest.raises(errors.TransientError, match="uplink up-a has the node's own address 192.0.2.7"):
        node.attach(own)
    assert node.detach(own) is True
    node.space.sh("ip", "addr", "del", "192.0.2.7/24", "dev", "up-a")


def test_a_vlan_that_the_kernel_cannot_do_is_told_and_leaves_nothing(node: Node) -> None:
    """This kernel has no 8021q: what a node without it says."""
    port = node.port("one", vlan=42)
    if subprocess.run(["modprobe", "-q", "8021q"], check=False).returncode == 0:
        pytest.fail("this kernel has 8021q: give this test a real VLAN")
    with pytest.raises(errors.TransientError, match="network 'a': ip: exit code"):
        node.attach(port)
    assert node.detach(port) is True


class Dead(BaseException):
    """kill -9, as far as a function can tell."""


class Deadly:
    """A ``run`` that dies with the n-th program: after it, or of ip(8)'s lines half-way through."""

    def __init__(self, at: int) -> None:
        self.at, self.ran = at, 0

    def __call__(self, argv: list[str], **more: Any) -> Any:
        self.ran += 1
        if self.ran != self.at:
            return run(argv, **more)
        if argv[0] == "ip" and "stdin" in more:
            lines = more["stdin"].splitlines(keepends=True)
            more = {**more, "stdin": b"".join(lines[: len(lines) // 2]), "check": False}
        if argv[0] != "nft":  # a transaction: before or after, never half-way
            run(argv, **more)
        raise Dead


def dies(monkeypatch: pytest.MonkeyPatch, at: int, function: Any, port: Port) -> bool:
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "run", Deadly(at))
        try:
            function(port)
        except Dead:
            return True
    return False


@pytest.mark.parametrize("other", [False, True], ids=["alone", "with-another"])
def test_a_death_at_any_moment_is_undone_and_hurts_nobody_else(node: Node, stack: Any, monkeypatch: Any, other: bool) -> None:
    """Of an attach; then of its undo, too; then it is undone in peace."""
    neighbour = Vm(stack, node, "neighbour", host=11) if other else None
    port, moments = node.port("one"), 1
    while dies(monkeypatch, moments, node.attach, port):
        dies(monkeypatch, 1 + moments % 3, node.detach, port)
        assert node.detach(port) is True
        assert [each for each in node.left() if other is False or port.device in each] == []
        moments += 1
    assert moments == (5 if other else 10)
    assert node.detach(port) is True
    if neighbour:
        wire = outside(stack, node)
        neighbour.tap.send(neighbour.udp("10.1.0.1"))
        assert len(wire.frames()) == 1


def test_tables_are_listed_and_deleted_as_nft_would(node: Node) -> None:
    made = ["netdev wnodes-a", "bridge wnodes-a", "inet site", "ip wnodes-a"]
    for each in made:
        node.space.sh("nft", "add", "table", *each.split())
    node.space.sh("nft", "add", "chain", "bridge", "wnodes-a", "input", "{ type filter hook input priority 0; }")
    assert node.space.run(tables.tables) == set(made)
    node.space.run(tables.remove, ["bridge wnodes-a", "netdev wnodes-a", "netdev wnodes-never"])
    assert node.space.sh("nft", "list", "tables").splitlines() == ["table inet site", "table ip wnodes-a"]
    node.space.run(tables.remove, ["inet site", "ip wnodes-a"])
    node.space.run(tables.remove, ["inet site", "ip wnodes-a"])


def test_many_at_once_are_independent(node: Node) -> None:
    ports = [node.port(f"n{n}", host=n + 20) for n in range(8)]
    threads = [threading.Thread(target=node.attach, args=(port,)) for port in ports[:1]]
    for thread in threads:
        thread.start()
        thread.join()
    for port in ports[1:]:
        node.attach(port)
    taps = json.loads(node.space.sh("ip", "-j", "link", "show", "master", names.bridge(ports[0])))
    assert {each["ifname"] for each in taps} == {"up-a", *(port.device for port in ports)}
    for port in ports:
        assert node.detach(port)
