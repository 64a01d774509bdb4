"""wnodesd's systemd unit and the drop-ins that we ship, on a real systemd with a real udevd: in a guest.

The guest is the ordinary cloud image, which boots no further than it must for this (``systemd.run=``).
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
import yaml

import wnodes_core
from wnodes_core.agent import server
from wnodes_core.guest import start

sys.path.insert(0, str(Path(__file__).parent.parent))
from guest_bundle import add_lvm, add_packages, add_programs, add_text, answer_of  # noqa: E402
from guests import Guest  # noqa: E402

pytestmark = pytest.mark.guest
HERE = Path(__file__).parent
# Each once "tar" has put it there, the bootstrap then waits for us as in any guest.
RUN = ("/usr/bin/tar -x --skip-old-files --no-same-owner -C / -f /dev/vdc", "/usr/bin/python3 -IS /opt/bootstrap")
UDEV_RULES = [path for path in Path("/usr/lib/udev/rules.d").iterdir() if "-dm" in path.name or "-lvm" in path.name]


class Systemd(Guest):
    """A guest with two disks more: an empty one, and a tar archive of what it needs."""

    def _argv(self, *given: Any) -> list[str]:
        argv = super()._argv(*given)
        argv[argv.index("-append") + 1] += "".join(f' systemd.run="{line}"' for line in RUN)
        with (self.folder / "pv").open("wb") as file:
            file.truncate(256 << 20)
        with tarfile.open(self.folder / "tar", mode="w") as tar:
            add_lvm(tar, "devices { use_devicesfile = 0 }\n")
            add_programs(tar, ["/usr/sbin/nft", "/usr/sbin/dmsetup", "/usr/sbin/mke2fs", "/usr/sbin/e2fsck"])
            for rules in UDEV_RULES:
                tar.add(rules, f"etc/udev/rules.d/{rules.name}")
            add_packages(tar, wnodes_core, pluggy, yaml)
            for name in ("lvm_main.py", "unit_main.py", "unit_case.py"):
                tar.add(HERE / name, f"opt/{name}")
            add_text(tar, "opt/bootstrap", start.bootstrap_text())
            add_text(tar, "opt/wnodesd.service", server.unit().replace(f"{Path(sys.executable).parent}/wnodesd", "/usr/bin/true"))
            for name in server.DROP_INS:
                add_text(tar, f"opt/{name}.conf", server.drop_in(name))
        drive = "-drive", "file={},if=virtio,format=raw,cache=unsafe"
        return [*argv, *(word.format(self.folder / name) for name in ("pv", "tar") for word in drive)]


@pytest.fixture(scope="module")
def answers(cloud_image: Any) -> Iterator[dict[str, Any]]:
    guest = Systemd(cloud_image, mounts=0)
    try:
        yield answer_of(guest, "cd /opt && exec python3 -s unit_main.py /dev/vdb", 240)
    finally:
        guest.close()


def test_the_unit_alone_allows_neither_and_the_doctor_says_so(answers: dict[str, Any]) -> None:
    alone = answers[""]
    assert alone["lacks"] == {"network": "CAP_NET_ADMIN", "lvm": "CAP_SYS_ADMIN CAP_MKNOD"}
    assert "not permitted" in alone["network"].lower(), alone
    assert alone["plain volume"] and alone["thin volume"], alone


def test_the_drop_in_for_networks_allows_networks_and_no_volumes(answers: dict[str, Any]) -> None:
    found = answers["network"]
    assert (found["network"], set(found["lacks"])) == ("", {"lvm"}), found
    assert found["plain volume"] and found["thin volume"], found


def test_with_that_for_lvm_too_both_are_allowed(answers: dict[str, Any]) -> None:
    both = dict.fromkeys(("network", "plain volume", "thin volume", "verify"), "")
    assert answers["lvm network"] == {**both, "lacks": {}}


def test_systemd_finds_nothing_wrong_with_any_of_them(answers: dict[str, Any]) -> None:
    assert {name: found["verify"] for name, found in answers.items()} == dict.fromkeys(answers, "")
