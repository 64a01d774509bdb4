"""Which guests virtiofs serves, and what its server is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import NoProvider
from wnodes_core.guest.guest_users import may_load
from wnodes_core.model import Mount
from wnodes_core.storage import virtiofs

VIRTIOFS = "fs/fuse/virtiofs"
DEVICE = {"provider": "virtiofs", "filesystem": {"tag": "wnodes0"}}


def _attach(**facts: Any) -> Any:
    guest = {"port": "org.wnodes.mount.0", "equipped": DEVICE, **facts}
    return virtiofs.wnodes_mount_attach(Mount("/tmp", "/t"), "/nowhere", guest, "virtiofs")


def test_a_guest_whose_kernel_has_none_is_left_to_the_next_provider() -> None:
    with pytest.raises(NoProvider, match="kernel has no virtiofs"):
        _attach(virtiofs=False)
    for facts in ({"virtiofs": True}, {}):
        (step,) = _attach(**facts)["guest"]
        assert step["argv"][4:] == ["virtiofs", "nosuid,nodev", "wnodes0", "/run/wnodes/mounts/org.wnodes.mount.0"]


def test_a_vm_without_the_device_is_left_to_the_next_provider() -> None:
    with pytest.raises(NoProvider, match="no device for it"):
        _attach(equipped=None)


@pytest.mark.parametrize(
    ("files", "known"),
    [
        (["fuse.ko", "virtiofs.ko"], True),
        (["fuse.ko.xz", "virtiofs.ko.xz"], True),
        (["fuse.ko"], False),  # Linux before 5.4
    ],
)
def test_a_guest_tells_what_its_kernel_can_load(tmp_path: Path, files: list[str], known: bool) -> None:
    (tmp_path / "kernel/fs/fuse").mkdir(parents=True)
    for name in files:
        (tmp_path / "kernel/fs/fuse" / name).touch()
    assert may_load(str(tmp_path), VIRTIOFS) is known


def test_a_guest_without_modules_to_be_seen_is_tried(tmp_path: Path) -> None:
    assert may_load(str(tmp_path / "none"), VIRTIOFS)
    assert not may_load(str(tmp_path), VIRTIOFS), "modules there are, of file systems none"


def test_the_socket_goes_with_the_gateway(tmp_path: Path) -> None:
    made = virtiofs.wnodes_mount_equip(Mount(str(tmp_path), "/t"), 3, str(tmp_path), {}, "virtiofs", None)
    assert made is not None and (tmp_path / "fs3.sock").exists()
    for _ in range(2):
        assert virtiofs.wnodes_mount_detach(made)
        assert not (tmp_path / "fs3.sock").exists()


def test_the_server_in_rust_is_told_so_in_its_own_words(tmp_path: Path) -> None:
    """Its sandbox=chroot wants to be called root for, which we are not (``virtiofs_exec`` confines it)."""
    server = tmp_path / "virtiofsd"
    server.write_text("#!/bin/sh\necho '      --shared-dir <SHARED_DIR>'\n")
    server.chmod(0o755)
    argv = virtiofs.server_argv(str(server), 7)
    assert argv[1:] == ["--fd=7", "--shared-dir=/tmp", "--sandbox=none", "--rlimit-nofile=0"]
