"""Two real guests on two worker nodes: what reaches whom when guest root does its worst."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from netns_kit import Namespace, Seen, Wiretap, veth  # noqa: E402
from network_guests import RealGuest  # noqa: E402

from wnodes_core.api import Port, mac_of  # noqa: E402
from wnodes_core.network import bridge, names  # noqa: E402
from wnodes_core.network.links import links  # noqa: E402

pytestmark = [pytest.mark.net, pytest.mark.guest]
NODE = "169.254.77.1"
ADDRESSES = ("10.1.1.10", "10.1.2.10")


@pytest.fixture(scope="module")
def site(ordinary_user: Any, minimal_image: Any) -> Iterator[SimpleNamespace]:
    """Two nodes, a switch between them, a guest on each."""
    with contextlib.ExitStack() as stack, open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wire = Namespace()
        stack.callback(wire.close)
        wire.quiet("all", "default")
        wire.sh("ip", "link", "add", "net", "type", "bridge", "mcast_snooping", "0")
        wire.sh("ip", "link", "set", "net", "up")
        nodes, ports, guests = [], [], []
        for number, address in enumerate(ADDRESSES, 1):
            node = Namespace()
            stack.callback(node.close)
            veth(node, "eth1", wire, f"n{number}")
            wire.sh("ip", "link", "set", f"n{number}", "master", "net")
            port = names.with_tap(Port(
                f"vm@{number}", "lan", "bridge", ordinary_user.pw_uid, mac=mac_of("vm", str(number)), uplink="eth1",
                addresses=(f"{address}/16",), gateways=("10.1.0.1",), dns=("10.1.0.53",), node=NODE,
                local="169.254.80.5", node_ports=(2049,), mtu=1400,
            ))  # fmt: skip
            nic = node.run(bridge.wnodes_port_attach, port)
            stack.callback(node.run, bridge.wnodes_port_detach, port)
            nodes.append(node), ports.append(port)
            guests.append(RealGuest(node, ordinary_user, minimal_image, port, nic))
        phases = [guest.wait() for guest in guests]
        yield SimpleNamespace(wire=wire, nodes=nodes, ports=ports, guests=guests, phases=phases)
        left = [each for guest in guests for each in guest.close()]
        assert left == []
        for node, port in zip(nodes, ports, strict=True):
            assert node.run(bridge.wnodes_port_detach, port) is True
            assert [name for name in node.run(links) if name.startswith("wn")] == []


@pytest.fixture
def wiretap(site: SimpleNamespace) -> Iterator[Wiretap]:
    """All that leaves the first node."""
    tap = Wiretap(site.wire, "n1")
    yield tap
    tap.close()


def listener(space: Namespace, address: str, port: int) -> socket.socket:
    server: socket.socket = space.run(socket.create_server, (address, port))
    server.settimeout(10)
    return server


CONNECT = """
import socket
with socket.create_connection(("{to}", {port}), 5) as peer:
    print(peer.getsockname()[0], peer.recv(50).decode())
"""


def test_the_guest_has_what_its_node_decided_without_dhcp(site: SimpleNamespace) -> None:
    one = site.guests[0]
    assert one.run("cat", "/etc/resolv.conf") == "nameserver 10.1.0.53\n"
    routes = one.run("ip", "route")
    assert "default via 10.1.0.1 dev eth0" in routes
    assert "169.254.77.1 dev eth0 proto static scope link src 169.254.80.5" in routes
    link = one.run("ip", "addr", "show", "eth0")
    assert "inet 10.1.1.10/16" in link and "inet 169.254.80.5/32" in link and site.ports[0].mac in link
    assert "mtu 1400" in link
    assert all(phases["network"] < 5 for phases in site.phases), site.phases


def test_guests_of_two_nodes_talk(site: SimpleNamespace) -> None:
    one, two = site.guests
    two.python(
        "import os, socket\nserver = socket.create_server(('', 7000))\n"
        "if os.fork() == 0:\n os.setsid()\n peer, who = server.accept()\n peer.sendall(who[0].encode())"
    )
    assert one.python(CONNECT.format(to=ADDRESSES[1], port=7000)).split() == [ADDRESSES[0]] * 2


def test_guest_and_node_talk_and_nothing_of_it_leaves(site: SimpleNamespace, wiretap: Wiretap) -> None:
    with listener(site.nodes[0], "0.0.0.0", 2049) as server:
        answer = ask_in_background(site.guests[0], CONNECT.format(to=NODE, port=2049))
        peer, who = server.accept()
        with peer:
            peer.sendall(b"from the node " * 3)
        assert who[0] == "169.254.80.5"
        assert answer().startswith("169.254.80.5 from the node")
    assert [each for frame in wiretap.frames() if (each := Seen.of(frame)).kind in (0x800, 0x806)] == []


def ask_in_background(guest: RealGuest, script: str) -> Any:
    """Run a script in the guest while the test goes on; the result gives its output."""
    box: list[str] = []
    thread = threading.Thread(target=lambda: box.append(guest.python(script)))
    thread.start()

    def result() -> str:
        thread.join(30)
        return box[0]

    return result


RAW = """
import socket, struct
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("eth0", 0))
mac = bytes.fromhex("{mac}")
ends = socket.inet_aton("{source}") + socket.inet_aton("{to}")
total = sum(struct.unpack("!9H", bytes.fromhex("45000020000700004011") + ends))
total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
ip = bytes.fromhex("45000020000700004011") + struct.pack("!H", total) + ends
udp = bytes.fromhex("0fa01388000c0000") + b"evil"
for tag in ("", "8100002b", "88a8002b8100002c"):
    for source in (mac, bytes.fromhex("02dead000001")):
        if tag or source != mac or {spoofs}:
            link.send(b"\\xff" * 6 + source + bytes.fromhex(tag) + b"\\x08\\0" + ip + udp)
"""


def test_guest_root_that_sends_raw_frames_reaches_nobody(site: SimpleNamespace, wiretap: Wiretap) -> None:
    mac = site.ports[0].mac.replace(":", "")
    site.guests[0].python(RAW.format(mac=mac, source=ADDRESSES[0], to=ADDRESSES[1], spoofs=False))
    site.guests[0].python(RAW.format(mac=mac, source="10.1.0.1", to=ADDRESSES[1], spoofs=True))
    assert [frame for frame in wiretap.frames() if b"evil" in frame] == []
    site.guests[0].python(RAW.format(mac=mac, source=ADDRESSES[0], to=ADDRESSES[1], spoofs=True))
    seen = [Seen.of(frame) for frame in wiretap.frames() if b"evil" in frame]
    assert [(each.source, each.tag) for each in seen] == [(site.ports[0].mac, 0)], "the measure works"


def test_guest_root_that_takes_another_s_address_or_mac_falls_silent(site: SimpleNamespace, wiretap: Wiretap) -> None:
    one = site.guests[0]
    one.run("ip", "addr", "add", "10.1.0.1/32", "dev", "eth0")
    one.python("import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('10.1.0.1', 0))\ns.sendto(b'evil', ('10.1.2.10', 9))")
    one.run("ip", "addr", "del", "10.1.0.1/32", "dev", "eth0")
    one.run("ip", "link", "set", "eth0", "address", "02:de:ad:00:00:01")
    one.python("import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'evil', ('10.1.2.10', 9))")
    assert [frame for frame in wiretap.frames() if b"evil" in frame or frame[6:9] == b"\x02\xde\xad"] == []
    one.run("ip", "link", "set", "eth0", "address", site.ports[0].mac)


def test_the_tap_is_the_job_s_user_s_alone(site: SimpleNamespace, ordinary_user: Any) -> None:
    shown = site.nodes[0].sh("ip", "-d", "link", "show", "dev", site.ports[0].device)
    assert f" user {ordinary_user.pw_name} " in shown
