"""Which guests virtiofs serves, and what its server is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import NoProvider
from wnodes_core.guest.guest_users import may_load
from wnodes_core.model import Mount
from wnodes_core.storage import virtiofs

DEVICE = {"provider": "virtiofs", "filesystem": {"tag": "wnodes0"}}


def _attach(**facts: Any) -> Any:
    guest = {"port": "org.wnodes.mount.0", "equipped": DEVICE, **facts}
    return virtiofs.wnodes_mount_attach(Mount("/tmp", "/t"), "/nowhere", guest, "virtiofs")


def test_a_guest_whose_kernel_has_none_is_left_to_the_next_provider() -> None:
    with pytest.raises(NoProvider, match="kernel has no virtiofs"):
        _attach(virtiofs=False)
    for facts in ({"virtiofs": True}, {}):
        (step,) = _attach(**facts)["guest"]
        assert step["argv"][:5] == ["mount", "-t", "virtiofs", "-o", "nosuid,nodev"]


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
    assert may_load(str(tmp_path), "fuse", "virtiofs") is known


def test_a_guest_without_modules_to_be_seen_is_tried(tmp_path: Path) -> None:
    assert may_load(str(tmp_path / "none"), "fuse", "virtiofs")
    assert not may_load(str(tmp_path), "fuse", "virtiofs"), "modules there are, of file systems none"
