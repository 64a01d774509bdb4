"""What a guest that plays the worker node is given, as tar archive: programs of this host, our package, texts.

The host is the same Debian, so its programs and libraries fit.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LVM = ("/usr/sbin/lvm", "/usr/sbin/pdata_tools")
LINKS = {"lvm": ("lvs", "vgs", "lvcreate", "lvremove", "lvchange", "vgcreate"), "pdata_tools": ("thin_check", "thin_repair")}


def add_programs(tar: tarfile.TarFile, programs: Iterable[str]) -> None:
    """Each where the host has it, and the libraries that it wants."""
    for program in programs:
        libraries = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
        for path in (program, *re.findall(r"=> (/\S+)", libraries)):
            real = Path(path).resolve()
            tar.add(real, f"usr/{'sbin' if path == program else 'lib/x86_64-linux-gnu'}/{Path(path).name}")


def add_lvm(tar: tarfile.TarFile, conf: str) -> None:
    """LVM's programs under the names that are called, and its settings."""
    add_programs(tar, LVM)
    for target, names in LINKS.items():
        for name in names:
            link = tarfile.TarInfo(f"usr/sbin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    add_text(tar, "etc/lvm/lvm.conf", conf)


def add_packages(tar: tarfile.TarFile, *packages: Any) -> None:
    """Python packages as they are installed here, into /opt."""
    for package in packages:
        folder = Path(str(package.__file__)).parent
        tar.add(folder, f"opt/{folder.name}", filter=lambda each: None if "__pycache__" in each.name else each)


def add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    """A file."""
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    tar.addfile(info, io.BytesIO(text.encode()))


def unpack(guest: Any, disk: str) -> None:
    """Have the guest take what the tar archive on one of its disks gives it; what it has itself stays."""
    done = guest.run(["tar", "-x", "--skip-old-files", "--no-same-owner", "-C", "/", "-f", disk], timeout_s=60)
    assert done.code == 0, done.stderr


def answer_of(guest: Any, script: str, timeout_s: float) -> Any:
    """The last line, in JSON, of a program that plays the node in the guest."""
    done = guest.run(script, timeout_s=timeout_s)
    print(done.stderr.decode(errors="replace"))
    assert done.code == 0, done.stderr.decode(errors="replace")[-3000:] + guest.console()[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
