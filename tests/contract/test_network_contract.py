"""Every network provider keeps the same contract."""

from __future__ import annotations

import re
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Port
from wnodes_core.files import remove_tree
from wnodes_core.network import flows, names, ovs
from wnodes_core.testing import NetworkContract, NetworkFramesContract, NetworkNode
from wnodes_core.testing.forbidden import source_routed
from wnodes_core.testing.frames import BROADCAST, udp
from wnodes_core.tools import run

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("integration", "unit")]
from ovs_kit import Switch  # noqa: E402
from pci_kit import Machine  # noqa: E402

pytestmark = pytest.mark.net


class BridgeNode(NetworkNode):
    """A node of Linux bridges: one more piece for strangers to remove."""

    def pieces(self, port: Port) -> dict[str, Callable[[], object]]:
        return {**super().pieces(port), "bridge": lambda: self.space.sh("ip", "link", "del", names.bridge(port))}

    def inside(self, port: Port) -> str:
        return names.bridge(port)


class TestBridge(NetworkFramesContract):
    provider, kind = "wnodes_core.network.bridge", "bridge"

    @classmethod
    def make_node(cls) -> NetworkNode:
        return BridgeNode(cls.kind)

    def test_a_route_of_its_own_choice_is_refused(self, evil: Any) -> None:
        guest = evil()
        assert [what for what, frame in source_routed(guest.port).items() if guest.passed(frame)] == []


class OvsNode(NetworkNode):
    """A node with an Open vSwitch of its own, whose datapath is in user space."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.switch = Switch(self.space)

    def port(self, lease: str = "one", host: int = 10, **more: Any) -> Port:
        return replace(super().port(lease, host), **{"bridge": "wn-br", "datapath": "netdev", "vlan": 41, **more})

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        return self.switch.run(lambda: function(**arguments))

    def state(self) -> list[str]:
        found = super().state() + self.switch.vsctl("--bare", "--columns=_uuid", "list", "qos").split()
        for bridge in self.switch.vsctl("list-br").split():
            found += [f"port {bridge} {port}" for port in self.switch.vsctl("list-ports", bridge).split()]
            told = self.switch.run(lambda bridge=bridge: run(["ovs-ofctl", "--no-stats", "dump-flows", bridge], environ=ovs._environ()))
            rules = [line for line in told.text.splitlines() if "priority" in line]
            found += sorted(re.sub(r"(in_port=|output:)\d+", r"\1N", line) for line in rules)
        return [line for line in found if " ovs-netdev " not in line]  # the switch's own, there from its first bridge on

    def pieces(self, port: Port) -> dict[str, Callable[[], object]]:
        mine = ["ovs-ofctl", "del-flows", port.bridge, f"cookie={flows.cookie(port.lease):#x}/-1"]
        return {
            **super().pieces(port),
            "bridge": lambda: self.switch.vsctl("del-br", port.bridge),
            "port": lambda: self.switch.vsctl("del-port", port.bridge, port.device),
            "flows": lambda: self.switch.run(lambda: run(mine, environ=ovs._environ())),
        }

    def inside(self, port: Port) -> str:
        return port.bridge

    def close(self) -> None:
        self.switch.close()
        super().close()


class TestOvs(NetworkFramesContract):
    provider, kind = "wnodes_core.network.ovs", "ovs"

    @classmethod
    def make_node(cls) -> NetworkNode:
        return OvsNode(cls.kind)


class SiteBridgeNode(OvsNode):
    """The same with a bridge of the site's own, by which the node itself is in the tenant's VLAN."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        bridge = ["add-br", "site-br", "--", "set", "bridge", "site-br", "datapath_type=netdev"]
        self.switch.vsctl(*bridge, "--", "set", "port", "site-br", "tag=41", "--", "add-port", "site-br", "eth1")
        self.space.quiet("site-br")
        self.space.sh("ip", "addr", "add", "10.1.0.9/16", "dev", "site-br")
        self.space.sh("ip", "link", "set", "site-br", "up")

    def port(self, lease: str = "one", host: int = 10, **more: Any) -> Port:
        return super().port(lease, host, **{"bridge": "site-br", "uplink": "", **more})

    def pieces(self, port: Port) -> dict[str, Callable[[], object]]:
        return {what: remove for what, remove in super().pieces(port).items() if what != "bridge"}


class TestOvsOfTheSite(NetworkFramesContract):
    provider, kind = "wnodes_core.network.ovs", "ovs"
    test_kill_9_before_any_step_is_undone = None  # as on a bridge of ours
    test_a_closed_network_reaches_itself_and_what_is_allowed = None

    @classmethod
    def make_node(cls) -> NetworkNode:
        return SiteBridgeNode(cls.kind)

    @pytest.mark.parametrize("target", [BROADCAST, "01:00:5e:00:00:01", "33:33:00:00:00:01"])
    def test_the_node_takes_nothing_that_its_guest_sends_to_all(self, node: Any, evil: Any, target: str) -> None:
        """A switch hands such frames to the node as well, and Linux takes a datagram for its own address from them."""
        guest = evil()
        server = node.space.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        with server:
            server.bind(("", 5000))
            server.settimeout(0.2)
            for receiver in ("10.1.0.9", "10.1.255.255", "255.255.255.255", "224.0.0.1"):
                guest.tap.send(udp(guest.port.mac, target, guest.ip, receiver))
            with pytest.raises(TimeoutError):
                server.recv(100)
            with node.listen() as site:  # of others of the network it does
                site.send(udp("06:00:00:00:00:01", target, "10.1.0.1", "10.1.0.9", tags=((0x8100, 41),)))
                assert server.recv(100) == b"hello"


class PlainNode(NetworkNode):
    """A node on which nothing is made."""

    def pieces(self, port: Port) -> dict[str, Callable[[], object]]:
        return {}

    def occupy(self, port: Port) -> None:
        return None


class TestUser(NetworkContract):
    provider, kind = "wnodes_core.network.user", "user"

    @classmethod
    def make_node(cls) -> NetworkNode:
        return PlainNode(cls.kind)


class CardNode(PlainNode):
    """A node with a card of two virtual functions, on a sysfs of the test's own."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.folder, self.patch = Path(tempfile.mkdtemp(prefix="wnc-")), pytest.MonkeyPatch()
        self.machine = Machine(self.folder, self.patch)

    def port(self, lease: str = "one", host: int = 10, **more: Any) -> Port:
        return super().port(lease, host, **{"uplink": "ens1", "vlan": 42, **more})

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        return function(**arguments)

    def state(self) -> list[str]:
        return [f"{address} {self.machine.driver(address)}" for address in self.machine.own] + [each.name for each in (self.folder / "dev/vfio").iterdir()]

    def close(self) -> None:
        self.patch.undo()
        remove_tree(self.folder)
        super().close()


class TestPci(NetworkContract):
    provider, kind = "wnodes_core.network.pci", "pci"

    @classmethod
    def make_node(cls) -> NetworkNode:
        return CardNode(cls.kind)
