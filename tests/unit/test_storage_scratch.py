"""Scratch disks: their file, their room, and who may have one."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import policy, settings
from wnodes_core.errors import CommandError, HostBusy, HostError, LimitExceeded, SettingsError
from wnodes_core.model import Disk, Job, VmRequest
from wnodes_core.mounting import SHOW_SCRATCH
from wnodes_core.settings.schema import Rule, Settings
from wnodes_core.settings.scratch import ScratchSettings
from wnodes_core.storage import scratch

JOB = Job("slurm", "1", "n0", 1000, 1000, "ann")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(str(tmp_path / "scratch.raw"), "raw", serial="scratch", size_mib=64)


def admitted(request: VmRequest, **rule: Any) -> VmRequest:
    site = Settings(policy=(Rule(default_image="deb", **rule),))
    return policy.admit(request, JOB, site, person_of=lambda job: policy.Person("/home/ann", ()))


def test_the_file_has_its_size_its_room_and_a_file_system(disk: Disk) -> None:
    assert scratch.wnodes_disk_create(disk) is True
    found = os.stat(disk.path)
    assert (found.st_size, found.st_mode & 0o777) == (64 << 20, 0o600)
    assert found.st_blocks * 512 >= 64 << 20, "its room is set aside"
    shown = subprocess.run(["dumpe2fs", "-h", disk.path], capture_output=True, text=True, check=True).stdout
    assert "has_journal" not in shown and "Filesystem volume name:   scratch" in shown
    for _ in range(2):
        assert scratch.wnodes_disk_delete(disk) is True
        assert not os.path.exists(disk.path)


def test_other_disks_are_left_alone(disk: Disk) -> None:
    for other in (replace(disk, size_mib=0), replace(disk, base="/b"), replace(disk, format="vdi"),
                  replace(disk, format="qcow2", block=True)):  # fmt: skip
        assert scratch.wnodes_disk_create(other) is None
        assert scratch.wnodes_disk_delete(other) is None


def test_more_than_the_node_has_is_for_another_node_and_leaves_nothing(disk: Disk) -> None:
    with pytest.raises(HostBusy, match="scratch of 99999999999 MiB: No space left"):
        scratch.wnodes_disk_create(replace(disk, size_mib=99_999_999_999))
    assert not os.path.exists(disk.path)


def test_a_little_is_kept_for_the_node(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEEP_FREE", 1 << 60)
    with pytest.raises(HostBusy):
        scratch.wnodes_disk_create(disk)


def test_what_stands_in_its_place_is_not_touched(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    os.symlink(tmp_path / "precious", disk.path)
    with pytest.raises(HostError, match="File exists"):
        scratch.wnodes_disk_create(disk)
    assert scratch.wnodes_disk_delete(disk) is True
    assert (tmp_path / "precious").read_text() == "x" and os.path.islink(disk.path)


def test_a_folder_that_is_not_there_is_the_hosts_fault(disk: Disk) -> None:
    with pytest.raises(HostError, match="No such file") as caught:
        scratch.wnodes_disk_create(replace(disk, path="/nowhere/scratch.raw"))
    assert "1777" in caught.value.hint


def test_the_site_bounds_it_and_may_give_it_unasked() -> None:
    assert admitted(VmRequest()).scratch_mib is None
    assert admitted(VmRequest(scratch_mib=99)).scratch_mib == 99
    assert admitted(VmRequest(), default_scratch_mib=10).scratch_mib == 10
    assert admitted(VmRequest(scratch_mib=5), default_scratch_mib=10, max_scratch_mib=20).scratch_mib == 5
    with pytest.raises(LimitExceeded, match="scratch 21 MiB asked for, the site allows a VM 20 MiB"):
        admitted(VmRequest(scratch_mib=21), max_scratch_mib=20)


def test_a_vm_that_must_be_warm_has_it_too() -> None:
    assert admitted(VmRequest(start="warm"), default_scratch_mib=10).scratch_mib == 10
    assert admitted(VmRequest(start="warm", scratch_mib=5)).scratch_mib == 5


def test_a_guest_that_sees_no_scratch_disk_says_so() -> None:
    argv = ["sh", "-c", SHOW_SCRATCH, "scratch"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, env={**os.environ, "WNODES_LOOKS": "2"})
    assert done.returncode and "sees no disk of that name" in done.stderr, done


def test_a_qcow2_file_has_its_size_and_a_file_system_and_takes_little(disk: Disk, tmp_path: Path) -> None:
    thin = replace(disk, path=f"{tmp_path}/scratch.qcow2", format="qcow2")
    assert scratch.wnodes_disk_create(thin) is True
    found = os.stat(thin.path)
    assert found.st_mode & 0o777 == 0o600 and found.st_blocks * 512 < 4 << 20
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", thin.path, raw], check=True)
    assert raw.stat().st_size == 64 << 20
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
    assert scratch.wnodes_disk_delete(thin) is True and not os.path.exists(thin.path)


def test_a_qcow2_file_does_not_follow_a_link_that_another_put_there(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    thin = replace(disk, path=f"{tmp_path}/scratch.qcow2", format="qcow2")
    os.symlink(tmp_path / "precious", thin.path)
    with pytest.raises(HostError, match="File exists"):
        scratch.wnodes_disk_create(thin)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_program_that_fails_leaves_no_file(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: list[str], **_: Any) -> None:
        raise CommandError(argv, 1, "qemu-img: error while writing: No space left on device")

    monkeypatch.setattr(scratch, "run", fails)
    with pytest.raises(HostError, match="no file system"):
        scratch.wnodes_disk_create(disk)
    monkeypatch.setattr(scratch, "_made_file_system", lambda fd, disk: None)
    with pytest.raises(HostBusy, match="No space left"):
        scratch.wnodes_disk_create(replace(disk, path=f"{tmp_path}/scratch.qcow2", format="qcow2"))
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_can_set_nothing_aside_is_told_what_to_do(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with pytest.raises(HostError) as caught:
        scratch.wnodes_disk_create(disk)
    assert "qcow2" in caught.value.hint and not os.path.exists(disk.path)


def test_what_is_no_device_gets_no_file_system(disk: Disk, tmp_path: Path) -> None:
    """A user who could put a file in the node's place would gain nothing: it is his own program that writes."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(HostError, match="no block device"):
        scratch.wnodes_disk_create(replace(disk, path=str(tmp_path / "file"), block=True))
    with pytest.raises(HostError, match="No such file") as caught:
        scratch.wnodes_disk_create(replace(disk, path=str(tmp_path / "none"), block=True))
    assert "nodev" in caught.value.hint
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("volume_group: 'vg 0'", "scratch.volume_group: 'vg 0': want a name as LVM has them"),
        ("volume_group: -vg", "want a name as LVM has them"),
        ("volume_group: ..", "want a name as LVM has them"),
        ("thin_pool: p", "thin_pool 'p' without a volume_group"),
        ("volume_group: v\n  format: qcow2", "volume_group is in place of a file"),
        ("volume_group: v\n  folder: /scratch", "volume_group is in place of a file"),
        ("format: vmdk", "scratch.format: 'vmdk'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_their_place(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wnodes.yaml"
    file.write_text(f"scratch:\n  {text}\n")
    with pytest.raises(SettingsError) as caught:
        settings.load(file)
    assert said in caught.value.message and f"{file}:" in caught.value.message


def test_where_the_disk_of_a_lease_is(tmp_path: Path) -> None:
    where = ("l-1", "/leases/l-1")
    assert ScratchSettings().disk_for(0, *where) is None
    assert ScratchSettings().disk_for(5, *where) == Disk("/leases/l-1/scratch.raw", "raw", serial="scratch", size_mib=5)
    shared = ScratchSettings(folder="/fast", format="qcow2").disk_for(5, *where)
    assert shared and (shared.path, shared.format) == ("/fast/scratch-l-1.qcow2", "qcow2")
