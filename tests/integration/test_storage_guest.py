"""Folders of the host in a real guest, provider by provider: the contract's other half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wnodes_core.storage import bundle
from wnodes_core.testing.storage_attacks import StorageFaults

pytestmark = pytest.mark.guest


class TestSshfs(StorageFaults):
    provider, name = "wnodes_core.storage.sshfs", "sshfs"

    @classmethod
    def files(cls, guest: dict[str, Any]) -> list[dict[str, Any]]:
        return [] if guest["sshfs"] else bundle.files()

    def test_the_guest_tells_what_its_kernel_can_mount(self, guest: Any) -> None:
        """Debian's cloud kernel: so 9p leaves its mounts to the next provider."""
        assert (guest.facts["virtiofs"], guest.facts["9p"]) == (True, False)

    def test_the_kernel_reads_ahead(self, guest: Any, there: str) -> None:
        mounted = guest.run(["grep", "-m1", "fuse.sshfs", "/proc/self/mountinfo"]).stdout.decode().split()
        assert guest.run(f"cat /sys/class/bdi/{mounted[2]}/read_ahead_kb").stdout == b"4096\n"

    def test_guest_without_sshfs_mounts_with_the_hosts(self, guest: Any, mount_it: Any, home: Path) -> None:
        (home / "data").write_text("data")
        mount_it(home, "/own tools", sshfs=False)
        assert guest.run("cat '/own tools/data'").stdout == b"data"
        assert b"/usr/lib/wnodes/tools/" in guest.run("cat /proc/*/cmdline | tr '\\0' ' '").stdout
