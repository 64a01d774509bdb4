"""What a port costs: made and removed, beside one other lease of its node and beside 49; against the bare commands."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from figure import Figure, in_turn, median_ratio

from wnodes_core.api import Nic, Port, mac_of
from wnodes_core.backends.libvirt import devices
from wnodes_core.backends.libvirt.qmp import Monitor
from wnodes_core.network import bridge, filters, names, ovs
from wnodes_core.testing.wires import Namespace, veth
from wnodes_core.tools import run, spawn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/integration"))
from ovs_kit import Switch  # noqa: E402

MANY, RUNS = 50, 15
Pair = tuple[list[float], list[float]]  # ours, the bare commands'; seconds of each run


def measure() -> list[Figure]:
    """Linux bridge, with and without a VLAN, Open vSwitch, and the plug of a VM in its user's own network."""
    found: list[Figure] = []
    kinds = (("bridge", "bridge", bridge), ("bridge with a VLAN", "vlan", bridge), ("ovs", "ovs", ovs))
    for name, kind, hooks in kinds:
        with _node(kind) as call:
            if kind == "vlan" and not _has_8021q(call):
                found.append(Figure(f"port of kind {name}", None, "ms", note="this kernel has no 8021q"))
                continue
            found += _figures(f"port of kind {name}, attach + detach", *_of_ports(kind, hooks, call))
    return [*found, *_figures("port of kind user, plug", *_of_plugs())]


def _figures(name: str, few: Pair, many: Pair) -> Iterator[Figure]:
    for count, (ours, bare) in ((2, few), (MANY, many)):
        limit = f"; the bare commands {statistics.median(bare) * 1e3:.0f} ms, in turn" if bare else ""
        yield Figure(f"{name}, {count} leases up", statistics.median(ours) * 1e3, "ms", note=f"{RUNS} times{limit}")
    if few[1]:
        note = "median of pairs; two programs and two transactions of the kernel's are the least there is"
        yield Figure(f"{name}, {MANY} leases up: ours to the bare commands", median_ratio(*many), "x", note=note)
    limit = f"of the bare commands {_growth(few[1], many[1]):.2f}" if few[1] else "of idle QEMUs beside it"
    grown = _growth(few[0], many[0])
    yield Figure(f"{name}, {MANY} to 2 leases up", grown, "x", "<= 1.5", grown <= 1.5, limit)


def _growth(few: list[float], many: list[float]) -> float:
    return statistics.median(many) / statistics.median(few)


@contextmanager
def _node(kind: str) -> Iterator[Callable[..., Any]]:
    """A network namespace with an uplink, and a switch if need be; calls a function in it."""
    with ExitStack() as stack:
        space, wire = Namespace(), Namespace()
        stack.callback(space.close)
        stack.callback(wire.close)
        veth(space, "eth1", wire, "far")
        if kind != "ovs":
            yield space.run
            return
        switch = Switch(space)
        stack.callback(switch.close)
        yield switch.run


def _has_8021q(call: Callable[..., Any]) -> bool:
    run(["modprobe", "-q", "8021q"], check=False)
    argv = ["ip", "link", "add", "link", "eth1", "name", "eth1.9", "type", "vlan", "id", "9"]
    return not call(lambda: run(argv, check=False)).exit_code


def _of_ports(kind: str, hooks: Any, call: Callable[..., Any]) -> tuple[Pair, Pair]:
    ports = [_port(kind, number) for number in range(MANY - 1)]
    call(hooks.wnodes_port_attach, ports[0])
    few = _times(kind, hooks, call, _port(kind, MANY))
    for port in ports[1:]:
        call(hooks.wnodes_port_attach, port)
    many = _times(kind, hooks, call, _port(kind, MANY))
    for port in ports:
        call(hooks.wnodes_port_detach, port)
    return few, many


def _times(kind: str, hooks: Any, call: Callable[..., Any], port: Port) -> Pair:
    def ours() -> None:
        call(hooks.wnodes_port_attach, port)
        call(hooks.wnodes_port_detach, port)

    return in_turn(ours, lambda: call(_bare, kind, port), RUNS)


def _bare(kind: str, port: Port) -> None:
    """The same devices and rules by programs alone, which ask for nothing and check nothing."""
    tap, lines = port.device, []
    if kind != "ovs":
        lines = [f"link set dev {port.device} master {names.bridge(port)}"]
    bridge.ip([f"tuntap add dev {tap} mode tap user {port.uid}", *lines, f"link set dev {tap} up"])
    if kind == "ovs":
        words = ["--", "add-port", port.bridge, tap, f"tag={port.vlan}"]
        run(["ovs-vsctl", *words], environ=ovs._environ())
        bridge.nft(filters.of_switched_tap(port, (), in_user_space=True))
        run(["ovs-vsctl", "del-port", port.bridge, tap], environ=ovs._environ())
    else:
        bridge.nft(filters.of_tap(port, ()))
    bridge.ip([f"link del dev {tap}"])
    families = ("netdev",) if kind == "ovs" else ("netdev", "bridge")
    bridge.nft("".join(f"delete table {name}\n" for name in filters.names_of(tap, families)))


def _port(kind: str, number: int) -> Port:
    port = Port(
        f"lease-{number}", "lan", "ovs" if kind == "ovs" else "bridge", os.getuid(), mac=mac_of(str(number)),
        uplink="eth1", bridge="wn-br", datapath="netdev", vlan=0 if kind == "bridge" else 42,
        addresses=(f"10.1.0.{number + 2}/16",), gateways=("10.1.0.1",), node="169.254.77.1",
        local=f"169.254.80.{number + 2}", node_ports=(2049,),
    )  # fmt: skip
    return names.with_tap(port)


def _of_plugs() -> tuple[Pair, Pair]:
    """A NIC into a QEMU whose guest never runs: nothing of the node's is made, whatever else is up."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wnb-"))
        found = []
        for count, others in ((2, 1), (MANY, MANY - 2)):
            for number in range(others):
                _qemu(stack, f"{folder}/{count}-{number}")
            found.append(([_plugged(f"{folder}/{count}-run{each}") for each in range(RUNS)], []))
        few, many = found
        return few, many


def _plugged(path: str) -> float:
    with ExitStack() as own:
        monitor = _qemu(own, path)
        began = time.perf_counter()
        netdev, device = devices.orders(Nic("user", mac_of(path)), devices.free_bus(monitor.ask("query-pci")))
        monitor.ask("netdev_add", **netdev)
        monitor.ask("device_add", **device)
        return time.perf_counter() - began


def _qemu(stack: ExitStack, path: str) -> Monitor:
    """A stopped QEMU with a free slot, and its monitor once it answers."""
    argv = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"]
    argv += ["-qmp", f"unix:{path},server=on,wait=off", "-device", "pcie-root-port,id=pci.1"]
    child = spawn(argv)
    stack.callback(child.wait)
    stack.callback(child.kill)
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError("QEMU does not start")
        time.sleep(0.01)
    link = socket.socket(socket.AF_UNIX)
    link.connect(path)
    monitor = Monitor(link, path)
    stack.callback(monitor.close)
    monitor.ask("query-status")
    return monitor
