"""Open vSwitch for real (its datapath in user space): two worker nodes, three VLANs on one trunk."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Nic, Port, errors, mac_of
from wnodes_core.network import names, ovs
from wnodes_core.network.links import links
from wnodes_core.tools import run

sys.path.insert(0, str(Path(__file__).parent))
from netns_kit import BROADCAST, Namespace, Seen, Wiretap, arp, came, ping, tcp, udp, veth  # noqa: E402
from network_kit import NODE, Vm, outside  # noqa: E402
from ovs_kit import Switch  # noqa: E402

pytestmark = pytest.mark.net
VLANS = {"a": 41, "b": 42, "c": 43}
SITE_MAC = "06:00:00:00:00:01"


class Node:
    """A worker node with a trunk; the far end of it is ``nNUMBER``."""

    def __init__(self, wire: Namespace, number: int) -> None:
        self.space, self.wire, self.number = Namespace(), wire, number
        veth(self.space, "trunk", wire, f"n{number}")
        self.space.quiet("trunk")
        wire.sh("ip", "link", "set", f"n{number}", "master", "net")
        self.switch = Switch(self.space)

    def port(self, lease: str, network: str = "a", host: int = 10, **more: Any) -> Port:
        subnet = VLANS[network] - 40
        port = Port(
            lease=f"{lease}@{self.number}", network=network, kind="ovs", uid=12345, uplink="trunk", bridge="wn-br",
            datapath="netdev", vlan=VLANS[network], addresses=(f"10.{subnet}.{self.number}.{host}/16",),
            gateways=(f"10.{subnet}.0.1",), node=NODE, local=f"169.254.80.{host}",
            mac=mac_of(lease, network, str(self.number)), allow=(f"10.{subnet}.0.0/16",),
        )  # fmt: skip
        return replace(names.with_tap(port), **more)

    def cable(self, network: str) -> str:
        return f"n{self.number}"

    def attach(self, port: Port) -> Nic:
        return self.switch.run(ovs.wnodes_port_attach, port)

    def detach(self, port: Port) -> bool:
        return self.switch.run(ovs.wnodes_port_detach, port)

    def left(self) -> list[str]:
        """What of ours is there: devices, rules, bridges, queues, addresses."""
        found = [name for name in self.space.run(links) if name.startswith(("wnt", "wn-"))]
        found += self.switch.vsctl("list-br").split() + self.switch.vsctl("--bare", "--columns=_uuid", "list", "qos").split()
        found += self.space.sh("nft", "list", "tables").splitlines()
        return found + [line for line in self.space.sh("ip", "route").splitlines() if "169.254" in line]

    def close(self) -> None:
        self.switch.close()
        self.space.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Namespace]:
    """The site's switch, which lets all VLANs pass, and an end of it for the test."""
    space = Namespace()
    space.quiet("all", "default")
    space.sh("ip", "link", "add", "net", "type", "bridge", "mcast_snooping", "0")
    space.sh("ip", "link", "add", "site", "type", "veth", "peer", "name", "s")
    space.sh("ip", "link", "set", "s", "master", "net", "up")
    for name in ("net", "site"):
        space.sh("ip", "link", "set", name, "up")
    yield space
    space.close()


@pytest.fixture(scope="module")
def nodes(wire: Namespace) -> Iterator[tuple[Node, Node]]:
    made = Node(wire, 1), Node(wire, 2)
    yield made
    for node in made:
        node.close()


@pytest.fixture
def node(nodes: tuple[Node, Node]) -> Iterator[Node]:
    yield nodes[0]
    assert nodes[0].left() == []


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def test_three_vlans_on_two_nodes_know_nothing_of_each_other(nodes: Any, node: Node, stack: Any) -> None:
    here = {name: Vm(stack, node, f"vm-{name}", name) for name in VLANS}
    there = {name: Vm(stack, nodes[1], f"vm-{name}", name) for name in VLANS}
    near = Vm(stack, node, "near", "a", host=11)
    trunk = outside(stack, node)
    for name, sender in here.items():
        frame = sender.udp(there[name].ip)
        sender.tap.send(frame)
        assert [Seen.of(each).tag for each in trunk.frames()] == [VLANS[name]]
        for other, vm in there.items():
            assert came(vm.tap.frames(0.05), frame) is (other == name), (name, other)
        assert came(near.tap.frames(0.02), frame) is (name == "a")


def test_the_way_to_the_node_never_leaves_the_machine(node: Node, stack: Any) -> None:
    vm, near = Vm(stack, node, "one", node_ports=(2049,)), Vm(stack, node, "two", host=11)
    trunk = outside(stack, node)
    vm.tap.send(arp(vm.mac, vm.port.local, NODE))
    assert [Seen.of(frame).source for frame in vm.tap.frames()] == [vm.node_mac]
    vm.tap.send(ping(vm.mac, vm.node_mac, vm.port.local, NODE))
    assert [Seen.of(frame).body[20] for frame in vm.tap.frames()] == [0]
    node.space.sh("ping", "-c1", "-W", "0.2", near.port.local, check=False)
    assert [Seen.of(frame).target for frame in near.tap.frames()] == [near.mac]
    for port, answers in ((2049, 1), (22, 0)):  # nobody listens: a reset is an answer
        vm.tap.send(tcp(vm.mac, vm.node_mac, vm.port.local, NODE, port))
        assert len(vm.tap.frames(0.1)) == answers
    for target in (BROADCAST, "02:00:00:00:00:99"):
        vm.tap.send(ping(vm.mac, target, vm.port.local, NODE))
    assert trunk.frames() == []
    vm.tap.frames()
    site = Wiretap(node.wire, "site")
    stack.callback(site.close)
    tags = ((0x8100, 41),)
    for frame in (arp(SITE_MAC, NODE, vm.port.local, tags=tags), udp(SITE_MAC, vm.mac, NODE, vm.port.local, tags=tags)):
        site.send(frame)
    site.send(udp(SITE_MAC, vm.mac, "10.1.0.1", vm.ip, tags=tags))
    assert [Seen.of(frame).body[12:16] for frame in vm.tap.frames()] == [b"\x0a\x01\x00\x01"]


def test_a_rate_holds(node: Node, stack: Any) -> None:
    vm = Vm(stack, node, rate_mbit=8)
    trunk, site = outside(stack, node), Wiretap(node.wire, "site")
    stack.callback(site.close)
    out, deadline = 0, time.monotonic() + 10
    while not out:  # a meter of Open vSwitch begins with an empty bucket, and fills it when it finds the time
        assert time.monotonic() < deadline
        time.sleep(0.1)
        for _ in range(400):
            vm.tap.send(vm.udp("10.1.0.1", text=bytes(1400)))
            site.send(udp(SITE_MAC, vm.mac, "10.1.0.1", vm.ip, text=bytes(1400), tags=((0x8100, 41),)))
        out = sum(len(frame) for frame in trunk.frames() if Seen.of(frame).source == vm.mac)
        assert out < 300_000
        assert sum(len(frame) for frame in vm.tap.frames()) < 400_000


def test_the_site_s_own_bridge_is_left_as_it_was(node: Node, stack: Any) -> None:
    stack.callback(node.switch.vsctl, "del-br", "site-br")
    node.switch.vsctl("add-br", "site-br", "--", "set", "bridge", "site-br", "datapath_type=netdev", "--", "add-port", "site-br", "trunk")
    port = node.port("one", bridge="site-br", uplink="")
    node.attach(port)
    assert node.detach(port) is True
    assert node.switch.vsctl("list-ports", "site-br").split() == ["trunk"]
    assert "169.254" not in node.space.sh("ip", "addr")
    flows = node.switch.run(lambda: run(["ovs-ofctl", "dump-flows", "site-br"], environ=ovs._environ()))
    assert [line for line in flows.text.splitlines() if "cookie" in line and "cookie=0x0," not in line] == []


def test_a_switch_that_was_restarted_gets_its_rules_again(node: Node, stack: Any) -> None:
    vm = Vm(stack, node, "one")
    node.switch.restart()
    trunk = outside(stack, node)
    vm.tap.send(vm.udp("10.1.0.1", sender="10.1.2.77"))
    assert trunk.frames() == [], "without rules it is closed"
    node.attach(vm.port)
    vm.tap.send(vm.udp("10.1.0.1", sender="10.1.2.77"))
    vm.tap.send(vm.udp("10.1.0.1"))
    assert [Seen.of(frame).body[12:16] for frame in trunk.frames()] == [b"\x0a\x01\x01\x0a"]


def test_faults_are_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = node.port("one", uplink="eth9")
    with pytest.raises(errors.TransientError, match="network 'a': this node has no device 'eth9'"):
        node.attach(missing)
    assert node.detach(missing) is True
    with pytest.raises(errors.TransientError, match="network 'a': Open vSwitch does not answer"):
        monkeypatch.setattr(ovs, "_TIMEOUT_S", 1)
        node.space.run(ovs.wnodes_port_attach, node.port("one"))  # no switch runs where the system's own would be
