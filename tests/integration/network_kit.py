"""A guest that the test itself plays, on a port that is attached."""

from __future__ import annotations

import contextlib
from typing import Any

from netns_kit import BROADCAST, Tap, Wiretap, udp

NODE = "169.254.77.1"


class Vm:
    """A port that is attached, and its guest's end."""

    def __init__(self, stack: contextlib.ExitStack, node: Any, lease: str = "vm", network: str = "a", **more: Any) -> None:
        self.port = node.port(lease, network, **more)
        self.node = node
        stack.callback(node.detach, self.port)
        self.nic = node.attach(self.port)
        self.tap = Tap(node.space, self.port.device)
        stack.callback(self.tap.close)
        self.mac, self.ip = self.port.mac, self.port.addresses[0].partition("/")[0]
        self.node_mac = self.nic.neighbours[0][1]
        self.tap.frames(0.02)

    def udp(self, receiver: str, target: str = BROADCAST, **more: Any) -> bytes:
        return udp(more.pop("source", self.mac), target, more.pop("sender", self.ip), receiver, **more)


def outside(stack: contextlib.ExitStack, node: Any, network: str = "a") -> Wiretap:
    """All that leaves the node by a network's cable."""
    tap = Wiretap(node.wire, node.cable(network))
    stack.callback(tap.close)
    return tap
