"""8021q for real: the kernel of this machine may have none, so a guest of ours plays the worker node.

The provider's own code runs in it, with the host's nft, and makes VLAN devices, bridges, taps and rules there.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pluggy
import pytest

import wnodes_core

pytestmark = [pytest.mark.net, pytest.mark.guest]
HERE = Path(__file__).parent
MODULES = ("8021q", "bridge", "veth", "tun", "nf_tables", "nft_limit")
PROGRAMS = ("/usr/sbin/nft", "/usr/sbin/sysctl")
WRAPPER = "#!/bin/sh\nexec {loader} --library-path /opt/node/lib {program} \"$@\"\n"


def packed() -> bytes:
    """Our packages, the tests' kit, and the host's programs with their libraries and loader, as a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for package in (wnodes_core, pluggy):
            folder = Path(package.__file__ or "").parent
            tar.add(folder, folder.name, filter=lambda info: None if "__pycache__" in info.name else info)
        for name in ("netns_kit.py", "network_kit.py", "vlan_main.py"):
            tar.add(HERE / name, name)
        for program in PROGRAMS:
            libraries = re.findall(r"/\S+", subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout)
            for library in libraries:
                tar.add(Path(library).resolve(), f"lib/{Path(library).name}")
            name = Path(program).name
            tar.add(Path(program).resolve(), f"real/{name}")
            loader = next(each for each in libraries if "ld-linux" in each)
            text = WRAPPER.format(loader=f"/opt/node/lib/{Path(loader).name}", program=f"/opt/node/real/{name}").encode()
            info = tarfile.TarInfo(f"usr/{name}")
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text))
    return out.getvalue()


def test_vlan_devices_bridges_and_rules_on_a_kernel_that_has_them(guest: Any) -> None:
    archive = {"path": "/opt/node.tar", "mode": 0o600, "content": base64.b64encode(packed()).decode(), "uid": 0, "gid": 0}
    guest.run("mkdir -p /opt/node /usr/local/sbin && tar -xf /opt/node.tar -C /opt/node && cp /opt/node/usr/* /usr/local/sbin/", files=[archive])
    loaded = guest.run(["modprobe", "-a", "--", *MODULES])
    assert loaded.code == 0, loaded.stderr
    # PATH of our programs, as wnodesd gives it, begins with /usr/local/sbin.
    done = guest.run("cd /opt/node && exec python3 -s vlan_main.py", timeout_s=120, environ={"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"})
    assert done.code == 0, done.stderr.decode()[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("devices")[0].startswith("wnb0042")
    assert found == {
        "leaves with tag": [42],
        "to the other VLAN": 0,
        "comes by tag 0": [0, 0],
        "comes by tag 42": [1, 0],
        "comes by tag 43": [0, 1],
        "forbidden, and passed": {},
        "the measure still works": 1,
        "left": [],
    }
