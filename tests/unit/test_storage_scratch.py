"""Scratch disks: their file, their room, and who may have one."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import policy
from wnodes_core.errors import BadRequest, HostBusy, HostError, LimitExceeded
from wnodes_core.model import Disk, Job, VmRequest
from wnodes_core.mounting import SHOW_SCRATCH
from wnodes_core.settings.schema import Rule, Settings
from wnodes_core.storage import scratch

JOB = Job("slurm", "1", "n0", 1000, 1000, "ann")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(str(tmp_path / "scratch.raw"), "raw", serial="scratch", size_mib=64)


def admitted(request: VmRequest, **rule: Any) -> VmRequest:
    settings = Settings(policy=(Rule(default_image="deb", **rule),))
    return policy.admit(request, JOB, settings, person_of=lambda job: policy.Person("/home/ann", ()))


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
    for other in (replace(disk, size_mib=0), replace(disk, base="/b"), replace(disk, format="qcow2")):
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


def test_a_vm_that_must_be_warm_has_none() -> None:
    assert admitted(VmRequest(start="warm"), default_scratch_mib=10).scratch_mib is None
    with pytest.raises(BadRequest, match="start=warm"):
        admitted(VmRequest(start="warm", scratch_mib=5))


def test_a_guest_that_sees_no_scratch_disk_says_so() -> None:
    done = subprocess.run(["sh", "-c", SHOW_SCRATCH, "scratch"], capture_output=True, text=True, timeout=20)
    assert done.returncode and "sees no disk of that name" in done.stderr, done
