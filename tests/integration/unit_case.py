"""What wnodesd does as root for networks and volumes, in its unit's place: how each came out goes to its state folder.

Run by systemd in a guest of ours; see ``test_unit_guest.py``. ``vg0`` and ``eth1`` are there.
"""

import json
import os
import traceback
from pathlib import Path

import lvm_main

from wnodes_core.api import Port, mac_of
from wnodes_core.doctor_host import Host
from wnodes_core.doctor_unit import lacking
from wnodes_core.network import bridge, names
from wnodes_core.network.links import links
from wnodes_core.settings import Settings
from wnodes_core.settings.network import NetworkRule, NetworkSettings
from wnodes_core.settings.scratch import ScratchSettings

SETTINGS = Settings(
    network=NetworkSettings(networks=(NetworkRule(name="lan", uplink="eth1"),)), scratch=ScratchSettings(volume_group="vg0")
)


def network():
    """A port on a bridge that leaves by eth1, with a VLAN, and its end."""
    port = Port("one", "lan", "bridge", 64321, mac=mac_of("one"), vlan=42, uplink="eth1", addresses=("10.1.1.10/16",),
                rate_mbit=100, node="169.254.77.1", local="169.254.80.10")  # fmt: skip
    port = names.with_tap(port)
    try:
        bridge.wnodes_port_attach(port)
        assert links()[port.device].master == names.bridge(port)
    finally:
        bridge.wnodes_port_detach(port)
    left = [name for name in links() if name.startswith("wn")]
    assert not left, left


def thin():
    """A volume in a thin pool that its user opens, and its end."""
    made = lvm_main.volume(pool="pool")
    with lvm_main.attached(made):
        assert lvm_main.as_user("head", "-c1", made.node).returncode == 0


def tried(case):
    """'' or the last line of what went wrong."""
    try:
        case()
    except Exception:  # noqa: BLE001 - it is the answer
        return traceback.format_exc().splitlines()[-1]
    return ""


if __name__ == "__main__":
    cases = {
        "network": network,
        "plain volume": lvm_main.case_its_user_and_nobody_else_opens_it_and_makes_the_file_system,
        "thin volume": thin,
    }
    answer = {name: tried(case) for name, case in cases.items()}
    answer["lacks"] = lacking(Host(), SETTINGS, os.getpid())
    Path(os.environ["STATE_DIRECTORY"], "answer").write_text(json.dumps(answer))
