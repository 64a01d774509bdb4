"""The kernel's NFS server for real: this host's kernel may have none, so the node is a guest of ours.

``nfsd_main.py`` exports and mounts there; the server's programs come from the host, which is the same Debian.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
from guest_bundle import add_packages, add_programs, add_text, answer_of, unpack  # noqa: E402
from guests import Guest  # noqa: E402

from wnodes_core.testing.nfs_client import STALE  # noqa: E402

pytestmark = pytest.mark.guest
HERE = Path(__file__).parent


class Node(Guest):
    """A guest with a disk more: a tar archive of what it needs."""

    def _argv(self, *given: Any) -> list[str]:
        with tarfile.open(self.folder / "tar", mode="w") as tar:
            add_programs(tar, ["/usr/sbin/exportfs", "/usr/sbin/rpc.nfsd", "/usr/sbin/rpc.mountd"])
            add_packages(tar, wnodes_core, pluggy, yaml)
            add_text(tar, "usr/lib/python3/dist-packages/wnodes.pth", "/opt\n")
            for path in ("/etc/netconfig", "/etc/services", "/etc/protocols"):
                tar.add(path, path[1:])
            tar.add(HERE / "nfsd_main.py", "opt/nfsd_main.py")
        return [*super()._argv(*given), "-drive", f"file={self.folder}/tar,if=virtio,format=raw,cache=unsafe"]


@pytest.fixture(scope="module")
def seen(full_kernel_image: Any) -> Iterator[dict[str, Any]]:
    guest = Node(full_kernel_image, mounts=0)
    try:
        unpack(guest, "/dev/vdb")
        yield answer_of(guest, "cd /opt && exec python3 nfsd_main.py", 120)
    finally:
        guest.close()


def test_it_is_used_where_it_runs(seen: dict[str, Any]) -> None:
    assert seen["before"] is False
    assert seen["usable"] == {"provider": "nfs", "problem": "", "needs": "export", "port": "2049"}
    assert seen["mounted"] == ["", ""] and seen["mounts"].count("vers=4.2") == 2


def test_whoever_asks_is_the_job_s_user(seen: dict[str, Any]) -> None:
    assert (seen["file"].splitlines()[:3], seen["owner"]) == (["home/file", "1234:1234", "cat: theirs: Permission denied"], 1234)
    assert seen["file"].count("Operation not permitted") == 2, "a device, and a file of root's"
    assert "cannot create theirs" in seen["file"]


def test_read_only_is_the_server_s_word(seen: dict[str, Any]) -> None:
    assert seen["read only"].startswith("home/file\n") and seen["read only"].count("Read-only file system") == 2


def test_forged_handles_lead_nowhere(seen: dict[str, Any]) -> None:
    """Of three things outside, in three forms each, read, listed and written under three uids: all stale."""
    assert seen["forged"] == [str(STALE)] * 81 and seen["kept"] == "closed/secret\n"
    assert seen["inside"] == ["GOT b'home/file\\n'"], "so made up, a handle of the share's own is good"
    assert seen["undefended"] == ["GOT b'closed/secret\\n'"], "without subtree_check it is read, through a folder that is closed"
    assert not [each for each in seen["elsewhere"] if each.startswith("GOT")]


def test_nothing_is_left(seen: dict[str, Any]) -> None:
    assert seen["left"] == ""
