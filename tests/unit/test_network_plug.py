"""A VM's way into its network, with the fake backend and the real agent."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from wnodes_core import ports
from wnodes_core.api import Nic, Port, Route, hookimpl, mac_of
from wnodes_core.backends import fake
from wnodes_core.errors import ChannelLost, NoProvider
from wnodes_core.files import remove_tree
from wnodes_core.network import user
from wnodes_core.plan import Plan

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import Stand  # noqa: E402

PORT = Port("l", "user", "user", mac=mac_of("l"))


@pytest.fixture
def stand() -> Iterator[Stand]:
    """A stand whose VM is to be in the user's own network."""
    stand = Stand(Path(tempfile.mkdtemp(prefix="wnp-")))
    stand.plan = replace(stand.plan, port=PORT)
    yield stand
    left = stand.left()
    fake.wnodes_vm_stop(vm=stand.plan.vm(()))
    remove_tree(stand.folder)
    assert not left, "\n".join(left)


def test_the_nic_is_plugged_and_the_guest_told_before_its_mounts(stand: Stand) -> None:
    stand.plugins.register(user, "user")
    stand.mount()
    assert stand.go() == []
    lines = stand.lines()
    assert lines.index("made port") < lines.index("making attachment")
    assert lines[-4:] == ["gone attachment", "gone port", "gone vm", "gone disk"]
    plugged = json.loads((stand.folder / "nic.json").read_text())
    told = json.loads((stand.folder / "guest/network.json").read_text())
    assert told == plugged
    assert Nic.from_dict(told) == user.wnodes_port_attach(PORT)
    names = [name for name, *_ in stand.trace.steps]
    assert names[names.index("agent") :] == ["agent", "network", "mount", "teardown"]


def test_a_port_that_wnodesd_made_is_neither_made_nor_removed_here(stand: Stand) -> None:
    stand.plan = replace(stand.plan, nic=Nic("tap", "02:00:00:00:00:01", "wnt0"))
    assert stand.go() == []
    assert not [line for line in stand.lines() if "port" in line]
    assert json.loads((stand.folder / "nic.json").read_text())["device"] == "wnt0"


def test_without_a_provider_the_network_is_named(stand: Stand) -> None:
    stand.plan = replace(stand.plan, port=replace(PORT, network="vlan42", kind="bridge"))
    stand.plugins.register(user, "user")
    with pytest.raises(NoProvider, match="network 'vlan42': no plug-in of the job's user makes a 'bridge' port"):
        stand.go()
    assert stand.lines()[-3:] == ["gone port", "gone vm", "gone disk"]


def test_a_backend_without_nics_is_named(stand: Stand) -> None:
    class None_:
        wnodes_api = 1

        @hookimpl(tryfirst=True)
        def wnodes_vm_plug(self) -> bool:
            return False

    stand.plugins.register(user, "user")
    stand.plugins.register(None_(), "none")
    with pytest.raises(NoProvider, match="this backend plugs no NIC of kind 'user'"):
        stand.go()


def test_a_guest_that_cannot_be_set_up_says_why(stand: Stand) -> None:
    stand.plugins.register(user, "user")
    (stand.folder / "guest/network.json").mkdir(parents=True)
    with pytest.raises(ChannelLost, match=r"network: .*Is a directory"):
        stand.go()


def test_ports_and_nics_survive_json() -> None:
    nic = Nic("tap", "02:00:00:00:00:01", "wnt0", ("10.0.0.2/24",), (Route("0.0.0.0/0", "10.0.0.1"),), (("10.0.0.1", "02:00:00:00:00:02"),), ("10.0.0.3",), 1400)
    assert Nic.from_dict(json.loads(json.dumps(nic.to_dict()))) == nic
    port = replace(PORT, addresses=("10.0.0.2/24",), node_ports=(22,), allow=("10.0.0.0/8",))
    assert Port.from_dict(json.loads(json.dumps(port.to_dict()))) == port


def test_a_plan_with_a_port_survives_json(stand: Stand) -> None:
    plan = replace(stand.plan, nic=user.wnodes_port_attach(PORT))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_macs_are_local_unicast_and_differ() -> None:
    made = {ports.mac_of(f"lease-{n}") for n in range(1000)}
    assert len(made) == 1000
    assert all(int(mac[:2], 16) & 3 == 2 for mac in made)


def test_the_user_s_own_network_has_nothing_to_remove() -> None:
    """``wnodes_port_detach`` of what is a part of QEMU."""
    assert user.wnodes_port_detach(PORT) is True
    assert user.wnodes_port_detach(replace(PORT, kind="bridge")) is None
