"""Scratch on real LVM: this host's kernel may have no device mapper, so our provider runs in a guest of ours.

The guest is the ordinary small one; LVM's programs come from the host, which is the same Debian, and so does our
package. ``lvm_main.py`` has the cases.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
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
from guests import Guest  # noqa: E402

pytestmark = pytest.mark.guest
HERE = Path(__file__).parent
PROGRAMS = ("/usr/sbin/lvm", "/usr/sbin/pdata_tools")
LINKS = {"lvm": ("lvs", "vgs", "lvcreate", "lvremove", "lvchange", "vgcreate"), "pdata_tools": ("thin_check", "thin_repair")}
# The small guest has no udevd: LVM makes its nodes itself. One in use is in use the first time it is asked.
CONF = b"activation { udev_sync = 0 udev_rules = 0 retry_deactivation = 0 }\ndevices { obtain_device_list_from_udev = 0 }\n"
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
        for program in PROGRAMS:
            libraries = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
            for path in (program, *re.findall(r"=> (/\S+)", libraries)):
                real = Path(path).resolve()
                tar.add(real, f"usr/{'sbin' if path == program else 'lib/x86_64-linux-gnu'}/{Path(path).name}")
        for target, names in LINKS.items():
            for name in names:
                link = tarfile.TarInfo(f"usr/sbin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, target
                tar.addfile(link)
        conf = tarfile.TarInfo("etc/lvm/lvm.conf")
        conf.size = len(CONF)
        tar.addfile(conf, io.BytesIO(CONF))
        for package in (wnodes_core, pluggy, yaml):
            folder = Path(str(package.__file__)).parent
            tar.add(folder, f"opt/{folder.name}", filter=lambda each: None if "__pycache__" in each.name else each)
        for file in (HERE / "lvm_main.py", *(HERE.parent / "golden/lvm").iterdir()):
            tar.add(file, f"opt/{file.name}")


@pytest.fixture(scope="module")
def ends(minimal_image: Any) -> Iterator[dict[str, str]]:
    guest = LvmGuest(minimal_image, mounts=0)
    try:
        done = guest.run(["tar", "-x", "--skip-old-files", "--no-same-owner", "-C", "/", "-f", "/dev/vdc"], timeout_s=60)
        assert done.code == 0, done.stderr
        done = guest.run("mkdir -p /run/lock/lvm; cd /opt && exec python3 lvm_main.py /dev/vdb", timeout_s=300)
        print(done.stderr.decode(errors="replace"))
        assert done.code == 0, done.stderr.decode(errors="replace")[-3000:] + guest.console()[-2000:]
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        guest.close()


@pytest.mark.parametrize("case", CASES)
def test_on_real_lvm(ends: dict[str, str], case: str) -> None:
    assert ends[case] == "", ends[case]


def test_every_case_was_played(ends: dict[str, str]) -> None:
    assert set(ends) == set(CASES) and len(CASES) > 10
