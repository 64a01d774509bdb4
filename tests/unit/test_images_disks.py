"""Overlays by the real qemu-img."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from wnodes_core.errors import BadFormat, ImageError, LibvirtDown, StateDirFull
from wnodes_core.images import disks
from wnodes_core.model import Disk
from wnodes_core.plugins import Plugins


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "odd, 'näme'"
    folder.mkdir()
    with open(folder / "base", "wb") as file:
        file.truncate(5 << 30)
    return folder / "base"


def info(path: Path) -> dict[str, object]:
    done = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    return dict(json.loads(done.stdout))


def test_an_overlay_through_the_hooks(base: Path) -> None:
    hook = Plugins(builtins=("wnodes_core.images.disks",), scan=False).hook
    disk = Disk(str(base.with_name("overlay")), "qcow2", str(base), "raw")
    assert hook.wnodes_disk_create(disk=disk) is True
    found = info(Path(disk.path))
    assert (found["virtual-size"], found["backing-filename"], found["backing-filename-format"]) == (
        5 << 30,
        str(base),
        "raw",
    )
    assert int(str(found["actual-size"])) < 1 << 20
    assert hook.wnodes_disk_delete(disk=disk) is True
    assert not Path(disk.path).exists() and base.exists()
    assert hook.wnodes_disk_delete(disk=disk) is True


def test_a_small_write_does_not_take_a_cluster(base: Path) -> None:
    disk = Disk(str(base.with_name("overlay")), "qcow2", str(base), "raw")
    disks.wnodes_disk_create(disk)
    before = Path(disk.path).stat().st_blocks * 512
    # One block in each of 200 clusters near each other: whole clusters would be 25 MB.
    writes = [word for i in range(200) for word in ("-c", f"write -q {i * 131072} 4096")]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, disk.path], check=True, capture_output=True)
    assert Path(disk.path).stat().st_blocks * 512 - before <= 200 * 4096 + (1 << 20)


@pytest.mark.parametrize(
    "disk",
    [Disk("/x/base", "qcow2", read_only=True), Disk("/x/blank", "qcow2"), Disk("/x", "qcow2", "/b", "raw", True)],
)
def test_other_disks_are_left_to_others(disk: Disk) -> None:
    assert disks.wnodes_disk_create(disk) is None
    assert disks.wnodes_disk_delete(disk) is None


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        (Disk("o", "qcow2", "/b", "raw"), "disk 'o': want an absolute path"),
        (Disk("/o", "qcow2", "json:{}", "raw"), "base 'json:{}'"),
        (Disk("/o", "raw", "/b", "raw"), "overlay 'raw' on 'raw'"),
        (Disk("/o", "qcow2", "/b", ""), "overlay 'qcow2' on ''"),
    ],
)
def test_what_no_overlay_can_be(disk: Disk, said: str) -> None:
    with pytest.raises(BadFormat) as caught:
        disks.wnodes_disk_create(disk)
    assert said in caught.value.message


def test_a_missing_base(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        disks.wnodes_disk_create(Disk(str(tmp_path / "o"), "qcow2", "/nonexistent/base", "raw"))


def test_a_full_disk_is_told_as_such(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=True)
    try:
        with pytest.raises(StateDirFull, match="No space left"):
            disks.wnodes_disk_create(Disk(str(small / "o"), "qcow2", str(base), "raw"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_blank_disk(tmp_path: Path) -> None:
    disks.create_blank(str(tmp_path / "scratch"), 2048)
    assert info(tmp_path / "scratch")["virtual-size"] == 2 << 30


def test_a_missing_qemu_img(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wnodes_core.command.PATH", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LibvirtDown):
        disks.create_blank(str(base) + "-blank", 1)


def test_a_clones_overlay_is_a_copy_of_the_blank_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = Disk(str(base.with_name("template")), "qcow2", str(base), "raw")
    assert disks.wnodes_disk_create(disk=below)
    blank = base.with_name("blank")
    disks.blank_for(below.path, str(blank))
    monkeypatch.setattr(disks, "run", lambda *_, **__: pytest.fail("a program was run"))
    clone = Disk(str(base.with_name("clone")), "qcow2", below.path, "qcow2", under=str(base), under_format="raw", blank=str(blank))
    assert disks.wnodes_disk_create(disk=clone) is True
    assert Path(clone.path).read_bytes() == blank.read_bytes()
    assert Path(clone.path).stat().st_mode & 0o777 == 0o600
    found = info(Path(clone.path))
    assert found["virtual-size"] == 5 << 30
    assert "backing-filename" not in found, "a template moves after its blank overlay was made"


def test_a_clones_overlay_is_made_where_there_is_no_blank_one(base: Path) -> None:
    below = Disk(str(base.with_name("template")), "qcow2", str(base), "raw")
    assert disks.wnodes_disk_create(disk=below)
    clone = Disk(str(base.with_name("clone")), "qcow2", below.path, "qcow2", blank=str(base.with_name("absent")))
    assert disks.wnodes_disk_create(disk=clone) is True
    assert info(Path(clone.path))["backing-filename"] == below.path


def test_a_blank_overlay_wants_qcow2_below(base: Path) -> None:
    with pytest.raises(BadFormat, match="want qcow2"):
        disks.blank_for(str(base), str(base.with_name("blank")))
