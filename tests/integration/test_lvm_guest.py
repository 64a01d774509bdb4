"""Scratch on real LVM: this host's kernel may have no device mapper, so our provider runs in a guest of ours.

The guest is the ordinary small one; LVM's programs come from the host, which is the same Debian, and so does our
package. ``lvm_main.py`` has the cases.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
import yaml

import wnodes_core

sys.path.insert(0, str(Path(__file__).parent.parent))
from guest_bundle import add_lvm, add_packages, answer_of, unpack  # noqa: E402
from guests import Guest  # noqa: E402

pytestmark = pytest.mark.guest
HERE = Path(__file__).parent
# The small guest has no udevd: LVM makes its nodes itself. One in use is in use the first time it is asked.
CONF = "activation { udev_sync = 0 udev_rules = 0 retry_deactivation = 0 }\ndevices { obtain_device_list_from_udev = 0 }\n"
CASES = re.findall(r"(?m)^def (case_\w+)\(", (HERE / "lvm_main.py").read_text())


class LvmGuest(Guest):
    """A guest with two disks more: an empty one, and a tar archive of what it needs."""

    def _argv(self, *given: Any) -> list[str]:
        disk = self.folder / "pv"
        with disk.open("wb") as file:
            file.truncate(256 << 20)
        bundle(self.folder / "tar")
        drive = "-drive", "file={},if=virtio,format=raw,cache=unsafe"
        more = [word.format(file) for file in (disk, self.folder / "tar") for word in drive]
        return [*super()._argv(*given), *more]


def bundle(path: Path) -> None:
    """LVM with its libraries, our package and what it imports, the cases."""
    with tarfile.open(path, mode="w") as tar:
        add_lvm(tar, CONF)
        add_packages(tar, wnodes_core, pluggy, yaml)
        for file in (HERE / "lvm_main.py", *(HERE.parent / "golden/lvm").iterdir()):
            tar.add(file, f"opt/{file.name}")


@pytest.fixture(scope="module")
def ends(minimal_image: Any) -> Iterator[dict[str, str]]:
    guest = LvmGuest(minimal_image, mounts=0)
    try:
        unpack(guest, "/dev/vdc")
        yield answer_of(guest, "mkdir -p /run/lock/lvm; cd /opt && exec python3 lvm_main.py /dev/vdb", 300)
    finally:
        guest.close()


@pytest.mark.parametrize("case", CASES)
def test_on_real_lvm(ends: dict[str, str], case: str) -> None:
    assert ends[case] == "", ends[case]


def test_every_case_was_played(ends: dict[str, str]) -> None:
    assert set(ends) == set(CASES) and len(CASES) > 10
