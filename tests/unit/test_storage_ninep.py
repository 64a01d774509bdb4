"""Which hosts and guests 9p serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import NoProvider
from wnodes_core.guest.guest_users import may_load
from wnodes_core.model import Mount
from wnodes_core.storage import ninep

DEVICE = {"provider": "9p", "filesystem": {"tag": "wnodes0"}}


def _attach(**facts: Any) -> Any:
    guest = {"port": "org.wnodes.mount.0", "equipped": DEVICE, **facts}
    return ninep.wnodes_mount_attach(Mount("/tmp", "/t"), "/nowhere", guest, "9p")


def _equip(**facts: Any) -> Any:
    return ninep.wnodes_mount_equip(Mount("/tmp", "/t", True), 2, "/lease", facts, "9p", None)


def test_qemu_serves_the_folder_itself() -> None:
    device = {"kind": "9p", "source": "/tmp", "tag": "wnodes2", "read_only": True}
    assert _equip() == {"provider": "9p", "process": None, "filesystem": device, "notice": ""}


@pytest.mark.parametrize("known", ["no", "No", False])
def test_an_image_whose_entry_says_that_it_has_none_gets_no_device(known: Any) -> None:
    with pytest.raises(NoProvider, match="image knows no 9p"):
        _equip(**{"9p": known})


def test_a_guest_whose_kernel_has_none_is_left_to_the_next_provider() -> None:
    with pytest.raises(NoProvider, match="kernel has no 9p") as caught:
        _attach(**{"9p": False})
    assert caught.value.hint == "facts: {9p: no} in the image's entry says so"
    for facts in ({"9p": True}, {}):
        (step,) = _attach(**facts)["guest"]
        assert step["argv"][4] == "9p" and step["argv"][-2] == "wnodes0"


def test_a_vm_without_the_device_is_left_to_the_next_provider() -> None:
    with pytest.raises(NoProvider, match="no device for it"):
        _attach(equipped=None)


def test_a_qemu_without_9p_leaves_the_mount_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As EL builds it; libvirt would refuse the whole VM."""
    qemu = tmp_path / "libexec/qemu-kvm"
    qemu.parent.mkdir()
    qemu.write_bytes(b"virtio-blk-pci")
    qemu.chmod(0o755)
    monkeypatch.setattr(ninep, "EMULATORS", (str(tmp_path / "none"), str(qemu)))
    with pytest.raises(NoProvider, match="QEMU has no 9p"):
        _equip()
    assert ninep.wnodes_mount_usable()["problem"] == "EL's QEMU has no 9p"
    qemu.write_bytes(b"..virtio-9p-pci..")
    assert _equip()


def test_a_host_without_qemu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ninep, "EMULATORS", ())
    assert ninep.wnodes_mount_usable()["problem"].startswith("no QEMU on this host")


@pytest.mark.parametrize(
    ("files", "known"),
    [
        (["fs/9p/9p.ko", "net/9p/9pnet_virtio.ko"], True),
        (["fs/9p/9p.ko.xz", "net/9p/9pnet_virtio.ko.xz", "net/9p/9pnet.ko.xz"], True),
        (["fs/9p/9p.ko", "net/9p/9pnet.ko"], False),  # no way to the device
        (["fs/fuse/fuse.ko"], False),
    ],
)
def test_a_guest_tells_what_its_kernel_can_load(tmp_path: Path, files: list[str], known: bool) -> None:
    for name in files:
        (tmp_path / "kernel" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kernel" / name).touch()
    assert may_load(str(tmp_path), "fs/9p/9p", "net/9p/9pnet_virtio") is known
