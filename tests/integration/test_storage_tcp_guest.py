"""sshfs over TCP in real guests: the whole contract on QEMU's own network, and a lease's mount on a bridge."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK, Guest  # noqa: E402
from netns_kit import Namespace  # noqa: E402
from network_guests import RealGuest  # noqa: E402

from wnodes_core.api import Image, Mount, Port, mac_of  # noqa: E402
from wnodes_core.network import bridge, names, user  # noqa: E402
from wnodes_core.storage import bundle  # noqa: E402
from wnodes_core.testing.storage_attacks import StorageFaults  # noqa: E402

pytestmark = pytest.mark.guest
NODE, LOCAL = "169.254.77.1", "169.254.80.5"


class NetGuest(Guest):
    """A guest with a NIC of kind user, as a lease's is plugged."""

    def _argv(self, image: Image, overlay: str, ports: Sequence[str], memory_mib: int, cpus: int) -> list[str]:
        argv = super()._argv(image, overlay, ports, memory_mib, cpus)
        return [*argv, "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="]


class TestSshfsTcp(StorageFaults):
    provider, name = "wnodes_core.storage.sshfs_tcp", "sshfs-tcp"

    @pytest.fixture(scope="class")
    @classmethod
    def guest(cls, minimal_image: Image) -> Iterator[Any]:
        booted = NetGuest(minimal_image, mounts=12)
        try:
            up = "modprobe virtio_net; until ip link show eth0; do sleep 0.1; done; ip addr add 10.0.2.15/24 dev eth0"
            assert booted.run(f"{up}; ip link set eth0 up").code == 0
            nic = user.wnodes_port_attach(Port("t", "user", "user"))
            assert nic is not None
            booted.facts["nic"] = nic.to_dict()
            yield booted
        finally:
            booted.close()

    @classmethod
    def files(cls, guest: dict[str, Any]) -> list[dict[str, Any]]:
        return [] if guest["sshfs"] else bundle.files()


@pytest.mark.net
def test_a_lease_s_mount_on_a_bridge_opens_no_port_of_the_node(ordinary_user: Any, minimal_image: Image) -> None:
    with contextlib.ExitStack() as stack, open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wnodes-src-", dir="/var/tmp")))
        os.chown(source, ordinary_user.pw_uid, ordinary_user.pw_gid)
        (source / "data").write_text("of the host")
        node = Namespace()
        stack.callback(node.close)
        port = names.with_tap(Port(
            "vm@1", "lan", "bridge", ordinary_user.pw_uid, mac=mac_of("vm", "1"), addresses=("10.1.1.10/16",),
            node=NODE, local=LOCAL, closed=True,
        ))  # fmt: skip
        nic = node.run(bridge.wnodes_port_attach, port)
        stack.callback(node.run, bridge.wnodes_port_detach, port)
        mounts = (Mount(str(source), "/data/in"), Mount(str(source), "/data/ro", True))
        guest = RealGuest(node, ordinary_user, minimal_image, port, nic, mounts=mounts, storage=("sshfs-tcp",))
        guest.wait()
        assert guest.run("cat", "/data/in/data", "/data/ro/data") == "of the host" * 2
        guest.run("sh", "-c", "echo back >/data/in/new")
        assert (source / "new").stat().st_uid == ordinary_user.pw_uid
        assert node.sh("ss", "-Hltn") == ""
        ways = [line.split() for line in node.sh("ss", "-Htn", "state", "established").splitlines()]
        assert {words[2].rpartition(":")[0] for words in ways} == {NODE}
        assert {words[3] for words in ways} == {f"{LOCAL}:30574", f"{LOCAL}:30575"}
        assert guest.close() == []
        assert node.sh("ss", "-Htn", "state", "established") == ""
