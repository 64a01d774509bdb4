"""What wnodesd allots: addresses of the node's own spans, VLANs, what it remembers of them."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.agent import leases
from wnodes_core.agent.ending import ORDER, Undoer
from wnodes_core.agent.ports import Ports
from wnodes_core.api import Nic, Port, hookimpl
from wnodes_core.errors import HostBusy, TransientError, WnodesError
from wnodes_core.files import remove_tree
from wnodes_core.journal import Journal
from wnodes_core.model import Job, VmRequest
from wnodes_core.plugins import Plugins
from wnodes_core.settings.network import NetworkRule, NetworkSettings

sys.path.insert(0, str(Path(__file__).parent))

LAN = NetworkRule(
    name="lan", kind="lab", uplink="eth1", vlan="42", range=("10.42.7.0/29", "fd00:42::10-fd00:42::1f"),
    subnet=("10.42.0.0/16", "fd00:42::/64"), gateway=("10.42.0.1",),
)  # fmt: skip
LAB_PORT = Port("x", "lan", "lab")
OWN = NetworkRule(name="own", kind="lab", uplink="eth1", vlan="100-101")


class Lab:
    """A provider that only notes what it is asked."""

    wnodes_api = 1

    def __init__(self) -> None:
        self.made: list[Port] = []
        self.broken = ""
        self.hangs = threading.Event()  # an undo waits for it
        self.hangs.set()

    @hookimpl
    def wnodes_port_allot(self, port: Port, taken: Any) -> Port | None:
        return replace(port, device=f"lab{len(taken)}") if port.kind in ("lab", "other") else None

    @hookimpl
    def wnodes_port_attach(self, port: Port) -> Nic | None:
        if self.broken == "attach":
            raise TransientError("no such luck")
        self.made.append(port)
        return Nic("tap", port.mac, port.device, addresses=port.addresses)

    @hookimpl
    def wnodes_port_detach(self, port: Port) -> bool | None:
        if self.broken == "detach":
            raise TransientError("it sticks")
        self.hangs.wait(10)
        self.made = [each for each in self.made if each.lease != port.lease]
        return True if port.kind == "lab" else None


class Node:
    """A wnodesd's ports, with leases in a folder."""

    def __init__(self, folder: Path, *rules: NetworkRule) -> None:
        self.folder, self.lab = folder, Lab()
        self.plugins = Plugins(builtins=(), scan=False)
        self.plugins.register(self.lab, "lab")
        self.settings = NetworkSettings(networks=rules or (LAN, OWN))
        self.leases: list[leases.Lease] = []
        self.restart()

    def restart(self) -> None:
        self.ports = Ports(lambda: self.settings, lambda: self.plugins.hook)
        for lease in self.leases:
            self.ports.adopt(lease)

    def lease(self, job: str, network: str = "lan") -> leases.Lease:
        facts = Job("fake", job, "n0", 1, 1, "u")
        where = (str(self.folder / "state"), str(self.folder / "run"))
        leases.folders(*where)
        made = leases.create(facts, VmRequest(image="i", network=network), *where, Journal)
        self.leases.append(made)
        return made

    def attach(self, job: str, network: str = "lan") -> Port:
        return Port.from_dict(self.ports.attach(self.lease(job, network))["port"])


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="wnp-"))
    yield made
    remove_tree(made)


def port_of(lease: leases.Lease) -> Any:
    return next(each for each in lease.journal.open_resources if each.kind == "port")


def test_a_lease_without_a_network_gets_no_port(folder: Path) -> None:
    node = Node(folder)
    assert node.ports.attach(node.lease("1", "")) == {}


def test_what_needs_no_root_is_left_to_the_keeper(folder: Path) -> None:
    node = Node(folder)
    lease = node.lease("1", "user")
    made = node.ports.attach(lease)
    assert (made["port"]["kind"], set(made)) == ("user", {"port"})
    assert not [each for each in lease.journal.open_resources if each.kind == "port"]


def test_addresses_come_from_the_node_s_spans_each_once(folder: Path) -> None:
    node = Node(folder)
    made = [node.attach(str(n)) for n in range(6)]
    assert [port.addresses for port in made[:2]] == [("10.42.7.1/16", "fd00:42::10/64"), ("10.42.7.2/16", "fd00:42::11/64")]
    assert made[0].local == "169.254.80.1"
    assert len({each for port in made for each in (*port.addresses, port.local, port.mac)}) == 24
    with pytest.raises(HostBusy, match="network 'lan': all of 10.42.7.0/29 is in use on this node"):
        node.attach("7")
    assert len(node.lab.made) == 6


def test_an_address_given_back_rests(folder: Path) -> None:
    node = Node(folder)
    node.attach("1")
    node.ports.detach(port_of(node.leases[0]))
    assert node.attach("2").addresses[0] == "10.42.7.2/16"
    for number in range(3, 7):
        node.attach(str(number))
    assert node.attach("7").addresses[0] == "10.42.7.1/16"


def test_a_span_of_vlans_gives_each_lease_its_own(folder: Path) -> None:
    node = Node(folder)
    assert [node.attach(job, "own").vlan for job in "12"] == [100, 101]
    with pytest.raises(HostBusy, match="all VLANs 100-101 are in use"):
        node.attach("3", "own")
    node.ports.detach(port_of(node.leases[0]))
    assert node.attach("4", "own").vlan == 100
    assert node.attach("5").vlan == 42


def test_the_same_lease_gets_the_same_port_again_also_after_a_restart(folder: Path) -> None:
    node = Node(folder)
    lease = node.lease("1")
    first = node.ports.attach(lease)
    assert node.ports.attach(lease) == first
    lease.journal.close()
    lease.journal = Journal(lease.journal.path)
    node.restart()
    assert node.ports.attach(lease) == first
    assert node.attach("2").addresses[0] == "10.42.7.2/16", "the first one's is taken"


def test_the_intent_is_in_the_journal_before_anything_is_made(folder: Path) -> None:
    node = Node(folder)
    node.lab.broken = "attach"
    lease = node.lease("1")
    with pytest.raises(TransientError, match="no such luck"):
        node.ports.attach(lease)
    assert Port.from_dict(port_of(lease).data).addresses[0] == "10.42.7.1/16"


def test_the_undo_removes_ports_after_processes_and_goes_on_after_a_failure(folder: Path) -> None:
    node = Node(folder)
    assert ORDER.index("keeper") < ORDER.index("port") < ORDER.index("folder")
    lease = node.lease("1")
    node.ports.attach(lease)
    undoer = Undoer(SimpleNamespace(release=lambda lease: None), lambda lease: None, {"port": node.ports})
    node.lab.broken = "detach"
    (error,) = undoer.undo(lease, job_over=True)[:1]
    assert "it sticks" in str(error)
    node.lab.broken = ""
    lease.tries = 9
    assert undoer.undo(lease, job_over=True) == []
    assert node.lab.made == []
    assert not Path(lease.journal.path).exists()


def test_a_port_that_no_plug_in_knows_is_not_forgotten(folder: Path) -> None:
    node = Node(folder)
    lease = node.lease("1")
    resource = lease.journal.making("port", "x", **Port("l", "gone", "strange").to_dict())
    with pytest.raises(WnodesError, match="no plug-in knows how to remove a 'strange' port"):
        node.ports.detach(resource)


def test_mending_asks_for_every_port_again_and_survives_errors(folder: Path) -> None:
    node = Node(folder)
    node.attach("1"), node.attach("2")
    node.lab.made.clear()
    node.ports.mend()
    assert len(node.lab.made) == 2
    node.lab.broken = "attach"
    node.ports.mend()


def test_a_kind_that_hangs_holds_up_no_other(folder: Path) -> None:
    other = NetworkRule(name="other", kind="other", uplink="eth2")
    node = Node(folder, LAN, other)
    node.attach("1")
    node.lab.hangs.clear()
    thread = threading.Thread(target=node.ports.detach, args=(port_of(node.leases[0]),))
    thread.start()
    try:
        made = threading.Thread(target=node.attach, args=("2", "other"))
        made.start()
        made.join(5)
        assert not made.is_alive() and len(node.lab.made) == 2
    finally:
        node.lab.hangs.set()
        thread.join()


def test_a_port_whose_lease_ended_meanwhile_is_not_made(folder: Path) -> None:
    node = Node(folder)
    lease = node.lease("1")
    with node.ports._one_of(LAB_PORT):  # another port of the kind is being made
        thread = threading.Thread(target=lambda: errors.append(told(node, lease)))
        errors: list[str] = []
        thread.start()
        until = time.monotonic() + 5
        while lease.id not in node.ports._taken:
            assert time.monotonic() < until
            time.sleep(0.01)
        node.ports._taken.pop(lease.id)
    thread.join(5)
    assert errors == ["network 'lan': the lease ended before its port was made"]
    assert node.lab.made == []


def told(node: Node, lease: leases.Lease) -> str:
    with pytest.raises(TransientError) as caught:
        node.ports.attach(lease)
    return caught.value.message
