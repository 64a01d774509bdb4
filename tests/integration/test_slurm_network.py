"""A tenant's VLAN under a real Slurm: who gets in, whom the guest reaches, and what is left of it.

Two worker nodes of one Slurm, one of which carries the VLAN; Open vSwitch in user space on both ends of the cable,
because this kernel has no 8021q. All of it, batch system and QEMU too, lives in a network namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from netns_kit import Namespace, inside, veth  # noqa: E402
from ovs_kit import Switch  # noqa: E402
from slurm_site import Site, until  # noqa: E402

from wnodes_core import processes  # noqa: E402
from wnodes_core.model import Image  # noqa: E402
from wnodes_core.network.links import links  # noqa: E402

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.net]
SETTINGS = """\
    advertise: true
    node: v0
network:
  networks:
    - {name: tenant, kind: ovs, bridge: wn-br, datapath: netdev, uplink: trunk, vlan: 41, nodes: [v0],
       range: [10.41.7.0/28], subnet: [10.41.0.0/16]}
policy:
  - networks: [tenant]
"""
MINE, OTHER = "10.41.0.1", "10.41.0.2"  # of one subnet, in two VLANs
ASK = f"""python3 - <<'END'
import socket
for address in ("{MINE}", "{OTHER}"):
    try:
        with socket.create_connection((address, 7000), 3) as peer:
            print(address, peer.recv(100).decode())
    except OSError as error:
        print(address, "nobody")
END
"""
LAN = "image=debian12,network=tenant"


@contextmanager
def a_tun_for_all() -> Iterator[None]:
    """The device as udev makes it on any node: every user may open it."""
    before = os.stat("/dev/net/tun").st_mode & 0o777
    os.chmod("/dev/net/tun", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/net/tun", before)


def whole_checksums(device: str) -> None:
    """As ``ethtool -K DEVICE tx off`` (linux/ethtool.h, ETHTOOL_STXCSUM): this switch completes none."""
    order = ctypes.create_string_buffer(struct.pack("II", 0x17, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        fcntl.ioctl(asked, 0x8946, struct.pack("16sQ16x", device.encode(), ctypes.addressof(order)))


def serve(space: Namespace, address: str, word: bytes, heard: list[str]) -> socket.socket:
    """A server that says a word to whoever comes, and remembers who that was."""
    space.sh("ip", "addr", "add", f"{address}/16", "dev", "eth0")
    space.run(whole_checksums, "eth0")
    server: socket.socket = space.run(socket.create_server, (address, 7000))

    def answer() -> None:
        with suppress(OSError):
            while True:
                peer, who = server.accept()
                with peer:
                    heard.append(who[0])
                    peer.sendall(word)

    threading.Thread(target=answer, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def place(minimal_image: Image) -> Iterator[SimpleNamespace]:
    with ExitStack() as stack:
        stack.enter_context(a_tun_for_all())
        node, wire = Namespace(), Namespace()
        veth(node, "trunk", wire, "far")
        node.sh("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")  # getaddrinfo wants one that is not 127.0.0.1
        here, there = Switch(node), Switch(wire)
        for each in (node, wire, here, there):
            stack.callback(each.close)
        there.vsctl("add-br", "net", "--", "set", "bridge", "net", "datapath_type=netdev", "--", "add-port", "net", "far")
        heard: dict[str, list[str]] = {MINE: [], OTHER: []}
        for vlan, address in ((41, MINE), (42, OTHER)):
            host = Namespace()
            stack.callback(host.close)
            veth(wire, f"host{vlan}", host, "eth0")
            there.vsctl("add-port", "net", f"host{vlan}", f"tag={vlan}")
            server = serve(host, address, b"welcome", heard[address])
            stack.callback(server.close)
            stack.callback(server.shutdown, socket.SHUT_RDWR)
        stack.enter_context(inside(node))
        stack.enter_context(here.here())
        site = stack.enter_context(Site(minimal_image, "v", nodes=2, settings=SETTINGS))
        yield SimpleNamespace(site=site, node=node, switch=here, heard=heard)


def left(place: SimpleNamespace) -> list[str]:
    """What of ports is there on the node."""
    found = [name for name in links() if name.startswith("wn")] + place.switch.vsctl("list-br").split()
    return found + place.node.sh("nft", "list", "tables").splitlines()


def features(site: Site, node: str) -> set[str]:
    told = site.lab.run(["scontrol", "-o", "show", "node", node])
    words = dict(word.partition("=")[::2] for word in told.split() if "=" in word)
    return set(words["AvailableFeatures"].split(","))


def restarted_for(site: Site, node: str) -> None:
    """wnodesd again, as the daemon of another node."""
    site.stop_wnodesd()
    site.config.write_text(site.config.read_text().replace("node: v0", f"node: {node}"))
    site.start_wnodesd()


def test_a_guest_meets_its_vlan_and_no_other(place: SimpleNamespace) -> None:
    site = place.site
    until(lambda: "vmnet_tenant" in features(site, "v0"), "the VLAN among the node's features")
    job = site.submit(ASK, f"--vm={LAN}", "--constraint=vmnet_tenant", image="")
    assert site.ended(job)["JobState"] == "COMPLETED", (site.output(job), site.log()[-3000:])
    assert site.output(job).splitlines()[-2:] == [f"{MINE} welcome", f"{OTHER} nobody"]
    assert site.show(job)["NodeList"] == "v0"
    assert place.heard == {MINE: ["10.41.7.1"], OTHER: []}
    site.assert_nothing_left()
    assert left(place) == []


def test_a_node_that_may_not_carry_it_neither_says_so_nor_takes_it(place: SimpleNamespace) -> None:
    site = place.site
    job = site.submit("echo bare", f"--vm={LAN}", "--nodelist=v1", image="")
    until(lambda: "network" in site.show_text(job) or site.output(job), f"a verdict: {site.show(job)}", 60)
    assert "network 'tenant'" in site.show_text(job), site.show_text(job)
    # Not while its Prolog still fails: Slurm puts it back into the queue after that, cancelled or not.
    until(lambda: site.show(job)["JobState"] == "PENDING", lambda: f"a job put back: {site.show(job)}", 60)
    site.run_as(["scancel", job])
    site.ended(job)
    assert "bare" not in site.output(job)
    restarted_for(site, "v1")
    until(lambda: "vm_debian12" in features(site, "v1"), "features of the other node")
    assert "vmnet_tenant" not in features(site, "v1")
    site.assert_nothing_left()
    assert left(place) == []


def test_nothing_is_left_of_cancelled_and_of_killed_jobs(place: SimpleNamespace) -> None:
    """The second's slurmstepd dies by kill -9; the port of the one stays while the other's goes."""
    site = place.site
    cancelled, killed = (site.submit("sleep 1000", f"--vm={LAN}", "--nodelist=v0", image="") for _ in range(2))
    leases = {job: site.wait_running(job) for job in (cancelled, killed)}
    taps = [name for name in links() if name.startswith("wnt")]
    assert len(taps) == 2
    site.run_as(["scancel", cancelled])
    site.ended(cancelled)
    until(lambda: len([name for name in links() if name.startswith("wnt")]) == 1, "the end of one port")
    stepd = next(p for p in processes.ancestry(leases[killed]["keeper_pid"]) if "slurmstepd" in p.exe)
    os.kill(stepd.pid, signal.SIGKILL)
    site.lab.run(["scancel", killed])  # Slurm itself finds out only after minutes
    site.ended(killed)
    site.assert_nothing_left()
    assert left(place) == []


