"""Folders of the host in a real guest, provider by provider: the contract's other half."""

from __future__ import annotations

import os
import signal
import time
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

    def test_a_gateway_that_dies_while_its_client_is_about_to_speak_is_an_error(
        self, guest: Any, mount_it: Any, folder_of: Any, ordinary_user: Any
    ) -> None:
        """The client is stopped with a question under way, so that it writes to a port at whose end is nobody."""
        who = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid}
        for turn in range(3):  # it was a race: two in three hung
            made = mount_it(folder_of(f"mute{turn}"), f"/mute{turn}")
            client = guest.run(f"pgrep -n -f /org.wnodes.mount.{made['guest'][-1]['port'].rpartition('.')[2]}").stdout.decode().strip()
            assert guest.run(["kill", "-STOP", client]).code == 0
            ask = f"(echo x >/mute{turn}/new; echo over >/tmp/mute{turn}) >/dev/null 2>/tmp/why{turn} & sleep 0.3"
            assert guest.run(ask, **who).code == 0
            os.kill(made["process"]["pid"], signal.SIGKILL)
            time.sleep(0.2)
            guest.run(["kill", "-CONT", client])
            done = guest.run(f"until [ -e /tmp/mute{turn} ]; do sleep 0.05; done; cat /tmp/why{turn}", timeout_s=20)
            assert b"error" in done.stdout or b"not connected" in done.stdout, done
            assert b"not connected" in guest.run(f"until ! [ -d /proc/{client} ]; do sleep 0.05; done; ls /mute{turn}", timeout_s=20).stderr

    def test_guest_without_sshfs_mounts_with_the_hosts(self, guest: Any, mount_it: Any, home: Path) -> None:
        (home / "data").write_text("data")
        mount_it(home, "/own tools", sshfs=False)
        assert guest.run("cat '/own tools/data'").stdout == b"data"
        assert b"/usr/lib/wnodes/tools/" in guest.run("cat /proc/*/cmdline | tr '\\0' ' '").stdout
