"""What a port costs: made and removed, alone on its node and beside 49 others."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from figure import Figure, seconds_of

from wnodes_core.api import Port, mac_of
from wnodes_core.network import bridge, names, ovs
from wnodes_core.tools import run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/integration"))
from netns_kit import Namespace, veth  # noqa: E402
from ovs_kit import Switch  # noqa: E402

MANY, RUNS = 50, 15


def measure() -> list[Figure]:
    """Linux bridge and Open vSwitch (its datapath in user space); a rootless port has nothing to make."""
    floor = statistics.median(seconds_of(lambda: run(["ip", "-V"]), RUNS)) * 1e3
    found = []
    for kind, hooks in (("bridge", bridge), ("ovs", ovs)):
        with _node(kind) as call:
            found += _both(kind, hooks, call, floor)
    return found


@contextmanager
def _node(kind: str) -> Iterator[Callable[..., Any]]:
    """A network namespace with an uplink, and a switch if need be; calls a function in it."""
    with ExitStack() as stack:
        space, wire = Namespace(), Namespace()
        stack.callback(space.close)
        stack.callback(wire.close)
        veth(space, "eth1", wire, "far")
        if kind == "bridge":
            yield space.run
            return
        switch = Switch(space)
        stack.callback(switch.close)
        yield switch.run


def _both(kind: str, hooks: Any, call: Callable[..., Any], floor: float) -> Iterator[Figure]:
    others = [_port(kind, number) for number in range(MANY - 1)]
    yield _figure(kind, 1, *_times(hooks, call, _port(kind, MANY)), floor)
    for port in others:
        call(hooks.wnodes_port_attach, port)
    yield _figure(kind, MANY, *_times(hooks, call, _port(kind, MANY)), floor)
    for port in others:
        call(hooks.wnodes_port_detach, port)


def _times(hooks: Any, call: Callable[..., Any], port: Port) -> tuple[float, float]:
    up, down = [], []
    for _ in range(RUNS):
        up += seconds_of(lambda: call(hooks.wnodes_port_attach, port), 1)
        down += seconds_of(lambda: call(hooks.wnodes_port_detach, port), 1)
    return statistics.median(up) * 1e3, statistics.median(down) * 1e3


def _figure(kind: str, leases: int, up: float, down: float, floor: float) -> Figure:
    note = f"attach {up:.0f} ms, detach {down:.0f} ms, {RUNS} times; {_what(leases)}; floor: {floor:.1f} ms a program"
    name = f"port of kind {kind}, attach + detach, {leases} {'lease' if leases == 1 else 'leases'}"
    return Figure(name, up + down, "ms", note=note)


def _what(leases: int) -> str:
    return "the bridge is made and removed, too" if leases == 1 else f"beside {leases - 1} others on the same bridge"


def _port(kind: str, number: int) -> Port:
    port = Port(
        f"lease-{number}", "lan", kind, os.getuid(), mac=mac_of(str(number)), uplink="eth1", bridge="wn-br",
        datapath="netdev", vlan=42 if kind == "ovs" else 0, addresses=(f"10.1.0.{number + 2}/16",),
        gateways=("10.1.0.1",), node="169.254.77.1", local=f"169.254.80.{number + 2}", node_ports=(2049,),
    )  # fmt: skip
    return names.with_tap(port)
