"""User-mode networking with a real guest, as an ordinary user types it: no root, no DHCP, no port on the node."""

from __future__ import annotations

import fcntl
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from lease_stage import WNODES, stage_fixture  # noqa: E402, F401 - fixtures

pytestmark = [pytest.mark.guest]
SCRIPT = """
import socket, os
seen = [name for name in os.listdir("/sys/class/net") if name != "lo"]
with socket.create_connection(("10.0.2.2", PORT), 10) as peer:
    peer.sendall(b"from the guest")
    print(peer.recv(100).decode(), len(seen), peer.getsockname()[0])
print(open("/etc/resolv.conf").read().strip())
"""


@pytest.fixture(scope="module", autouse=True)
def store(stage, minimal_image):
    boot = minimal_image.boot
    kernel = ["--kernel", boot.kernel, "--initrd", boot.initrd, "--cmdline", boot.cmdline]
    stage.run(WNODES, "image", "add", "-q", *kernel, "debian12", minimal_image.path)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_guest_connects_as_its_user_and_has_addresses_without_dhcp(stage):
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            peer, _ = server.accept()
            with peer:
                heard.append(peer.recv(100))
                peer.sendall(b"from the host")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        script = SCRIPT.replace("PORT", str(server.getsockname()[1]))
        done = stage.run(
            WNODES, "run", "-q", "--image", "debian12", "--network", "user", "--trace",
            "--", "python3", "-c", script, check=False, cwd="/",
        )  # fmt: skip
        thread.join(5)
    assert (done.returncode, heard) == (0, [b"from the guest"]), done.stderr
    assert done.stdout.decode().splitlines() == ["from the host 1 10.0.2.15", "nameserver 10.0.2.3"]
    assert b"network " in done.stderr


def test_a_guest_without_a_network_has_none(stage):
    done = stage.run(WNODES, "run", "-q", "--image", "debian12", "--", "ls", "/sys/class/net", cwd="/")
    assert done.stdout.split() == [b"lo"]
