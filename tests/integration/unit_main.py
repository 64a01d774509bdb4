"""wnodesd's unit and its drop-ins on a running systemd: ``python3 unit_main.py DISK``, in a guest of ours.

``unit_case.py`` stands in wnodesd's place under each set of drop-ins; the output is one JSON object, set to answer.
"""

import json
import shutil
import sys
from pathlib import Path

import lvm_main
from lvm_main import sh

UNIT = Path("/etc/systemd/system/wnodesd.service")
DROP_INS = UNIT.with_suffix(".service.d")
ANSWER = Path("/var/lib/wnodes/answer")
INSTEAD = "[Service]\nType=oneshot\nRestart=no\nExecStart=\nExecStart=/usr/bin/python3 -s /opt/unit_case.py\n"
SETS = ((), ("network",), ("lvm", "network"))


def under(names):
    """What came of it with these drop-ins, or systemd's words."""
    shutil.rmtree(DROP_INS, ignore_errors=True)
    DROP_INS.mkdir()
    for name in names:
        shutil.copy(f"/opt/{name}.conf", DROP_INS)
    said = sh("systemd-analyze", "verify", str(UNIT), check=False).stderr.decode()
    (DROP_INS / "zz-instead.conf").write_text(INSTEAD)
    sh("systemctl", "daemon-reload")
    ANSWER.unlink(missing_ok=True)
    sh("systemctl", "start", UNIT.name, check=False)
    if not ANSWER.exists():
        return {"failed": sh("journalctl", "-u", UNIT.name, "-n", "30", "--no-pager").stdout.decode()}
    return {**json.loads(ANSWER.read_text()), "verify": said}


def main():
    shutil.copy("/opt/wnodesd.service", UNIT)
    for module in ("tun", "bridge", "8021q", "nf_tables", "dm-mod", "dm-thin-pool"):
        sh("modprobe", module)
    sh("ip", "link", "add", "eth1", "up", "type", "veth", "peer", "name", "far")
    sh("ip", "link", "set", "far", "up")
    sh("udevadm", "control", "--reload")
    lvm_main.set_up(sys.argv[1])
    print(json.dumps({" ".join(names): under(names) for names in SETS}))


if __name__ == "__main__":
    main()
