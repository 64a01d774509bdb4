"""The bridge provider on a kernel with 8021q: run by the Python of a guest of ours, which plays the worker node.

Two VLANs on one uplink, a port in each; says what it saw as JSON. See ``test_network_vlan.py``.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace

from netns_kit import BROADCAST, Namespace, Seen, Wiretap, udp, veth
from network_kit import Vm

from wnodes_core.api import Port, mac_of
from wnodes_core.network import bridge, names
from wnodes_core.network.links import links
from wnodes_core.testing.forbidden import forbidden

SITE = "06:00:00:00:00:01"


class Node:
    """What the tests' kit wants of a worker node."""

    def __init__(self):
        self.space, self.wire = Namespace(), Namespace()
        self.wire.quiet("all", "default")
        veth(self.space, "eth1", self.wire, "far")
        self.space.quiet("eth1")

    def port(self, lease, vlan, host=10, **more):
        port = Port(
            lease, f"vlan{vlan}", "bridge", 12345, mac=mac_of(lease), vlan=int(vlan), uplink="eth1",
            addresses=(f"10.1.1.{host}/16",), node="169.254.77.1", local=f"169.254.80.{host}",
        )  # fmt: skip
        return replace(names.with_tap(port), **more)

    def cable(self, network):
        return "far"

    def attach(self, port):
        return self.space.run(bridge.wnodes_port_attach, port)

    def detach(self, port):
        return self.space.run(bridge.wnodes_port_detach, port)


def main():
    node, found = Node(), {}
    with ExitStack() as stack:
        one, other = Vm(stack, node, "one", "42"), Vm(stack, node, "other", "43", host=11)
        far = Wiretap(node.wire, "far")
        one.tap.send(one.udp("10.1.1.11"))
        found["leaves with tag"] = [Seen.of(frame).tag for frame in far.frames(0.5)]
        found["to the other VLAN"] = len(other.tap.frames(0.1))
        for tag in (0, 42, 43):
            far.send(udp(SITE, BROADCAST, "10.1.0.1", "10.1.1.10", tags=((0x8100, tag),) if tag else ()))
            found[f"comes by tag {tag}"] = [len(vm.tap.frames(0.3)) for vm in (one, other)]
        passed = {}
        for what, frame in forbidden(one.port).items():
            one.tap.send(frame)
            seen = far.frames(0.05) + other.tap.frames(0.01)
            if seen:
                passed[what] = [each.hex() for each in seen]
        found["forbidden, and passed"] = passed
        one.tap.send(one.udp("10.1.1.11"))
        found["the measure still works"] = len(far.frames(0.5))
        found["devices"] = sorted(name for name in node.space.run(links) if name.startswith("wn"))
    found["left"] = sorted(name for name in node.space.run(links) if name.startswith("wn"))
    found["left"] += node.space.sh("nft", "list", "tables").splitlines()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
