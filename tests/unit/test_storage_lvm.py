"""Logical volumes as scratch: the commands, what is refused, what is wiped, what is left alone. LVM is a fake here."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import command
from wnodes_core.api import Disk, Volume
from wnodes_core.errors import HostBusy, HostError, TransientError
from wnodes_core.storage import lvm, scratch

sys.path.insert(0, str(Path(__file__).parent.parent))
from lvm_kit import FakeLvm, fake_lvm  # noqa: E402

OWNER, UID = "0123456789ab", 64321
GOLDEN = Path(__file__).parent.parent / "golden/lvm"


@pytest.fixture
def vg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLvm]:
    with fake_lvm(tmp_path / "bin") as made:
        monkeypatch.setattr(command, "PATH", f"{made.folder}:{command.PATH}")
        yield made


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    node = f"/dev/wnodes-test-{os.getpid()}/{OWNER}/wnodes-slurm-n0-12-3-ab12cd"
    yield Volume("slurm-n0-12_3-ab12cd", "vg0", OWNER, node, size_mib=16, uid=UID, gid=UID)
    folder = Path(node).parent
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.parent.rmdir()


def thin(volume: Volume, **changes: Any) -> Volume:
    return replace(volume, pool="pool", **changes)


@pytest.mark.parametrize("kind", ["plain", "thin"])
def test_the_commands_are_as_reviewed(vg: FakeLvm, volume: Volume, kind: str) -> None:
    made = volume if kind == "plain" else thin(volume)
    assert lvm.wnodes_volume_attach(volume=made) is True
    assert lvm.wnodes_volume_list("vg0", OWNER, os.path.dirname(volume.node)) == [
        Volume("slurm-n0-12-3-ab12cd", "vg0", OWNER, volume.node)
    ]
    assert lvm.wnodes_volume_detach(volume=made) is True
    text = "\n".join(vg.transcript()).replace(volume.node, "NODE") + "\n"
    file = GOLDEN / f"{kind}.txt"
    if os.environ.get("WNODES_REGENERATE") == "1":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("pool", ["", "pool"])
def test_the_user_alone_can_open_an_empty_volume(vg: FakeLvm, volume: Volume, pool: str) -> None:
    made = replace(volume, pool=pool)
    lvm.wnodes_volume_attach(volume=made)
    found = os.stat(volume.node)
    assert stat.S_ISBLK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (UID, UID)
    assert found.st_rdev == os.stat(vg.device(made.name)).st_rdev
    folder = os.stat(os.path.dirname(volume.node))
    assert (folder.st_uid, stat.S_IMODE(folder.st_mode)) == (0, 0o711)
    opened = subprocess.run(["head", "-c1", volume.node], user=UID, group=UID, extra_groups=[], capture_output=True)
    other = subprocess.run(["head", "-c1", volume.node], user=UID + 1, group=UID + 1, extra_groups=[], capture_output=True)
    assert (opened.returncode, other.returncode) == (0, 1)
    assert Path(volume.node).read_bytes() == bytes(16 << 20), "no byte of an earlier tenant"
    disk = Disk(volume.node, "raw", serial="scratch", size_mib=16, block=True)
    assert scratch.wnodes_disk_create(disk=disk) is True
    subprocess.run(["e2fsck", "-fn", volume.node], check=True, capture_output=True)
    assert scratch.wnodes_disk_delete(disk=disk) is True and os.path.exists(volume.node), "the node is root's"
    lvm.wnodes_volume_detach(volume=made)
    assert not os.path.exists(volume.node) and not vg.ours()


def test_a_volume_is_stale_if_nobody_wipes_it(vg: FakeLvm, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(lvm, "_wipe", lambda volume: None)
    lvm.wnodes_volume_attach(volume=volume)
    assert b"secret of another tenant" in Path(volume.node).read_bytes()


def test_a_volume_that_cannot_be_wiped_is_given_to_nobody(vg: FakeLvm, volume: Volume) -> None:
    vg.fault(blkdiscard="BLKZEROOUT ioctl failed: Input/output error")
    with pytest.raises(TransientError, match="could not be wiped"):
        lvm.wnodes_volume_attach(volume=volume)
    assert os.stat(volume.node).st_uid == 0
    vg.fault()
    lvm.wnodes_volume_detach(volume=volume)
    assert not vg.ours()


def test_a_second_start_gets_an_empty_volume(vg: FakeLvm, volume: Volume) -> None:
    for _ in range(2):
        lvm.wnodes_volume_attach(volume=volume)
        assert not any(Path(volume.node).read_bytes())
        Path(volume.node).write_bytes(b"of the first keeper")
    lvm.wnodes_volume_detach(volume=volume)
    assert vg.free() == 100


@pytest.mark.parametrize(
    ("changes", "pool", "said"),
    [
        ({"pool": "pool", "size_mib": 101}, {}, "100 MiB of thin pool vg0/pool are not promised yet"),
        ({"pool": "pool", "promise_percent": 15}, {}, "15 MiB of thin pool"),
        ({"pool": "pool"}, {"data": "95.01"}, "95.01 % of the data of thin pool vg0/pool are used (limit 95 %)"),
        ({"pool": "pool"}, {"metadata": "96.00"}, "96 % of the metadata"),
    ],
)
def test_no_room_is_for_another_node_and_makes_nothing(
    vg: FakeLvm, volume: Volume, changes: dict[str, Any], pool: dict[str, str], said: str
) -> None:
    vg.pool(**pool)
    with pytest.raises(HostBusy) as caught:
        lvm.wnodes_volume_attach(volume=replace(volume, **changes))
    assert said in caught.value.message
    assert not vg.ours() and not any(line.startswith("lvcreate") for line in vg.transcript())


def test_a_full_group_is_for_another_node(vg: FakeLvm, volume: Volume) -> None:
    with pytest.raises(HostBusy, match=r'scratch of 104 MiB: Volume group "vg0" has insufficient free space'):
        lvm.wnodes_volume_attach(volume=replace(volume, size_mib=104))
    assert not vg.ours() and not os.path.exists(volume.node)


def test_what_is_promised_counts_though_nothing_of_it_is_written(vg: FakeLvm, volume: Volume) -> None:
    first = thin(volume, size_mib=70)
    second = thin(replace(volume, lease="other", node=f"{volume.node}2"), size_mib=40)
    lvm.wnodes_volume_attach(volume=first)
    with pytest.raises(HostBusy, match="30 MiB"):
        lvm.wnodes_volume_attach(volume=second)
    lvm.wnodes_volume_attach(volume=replace(second, promise_percent=110))
    for each in (first, second):
        lvm.wnodes_volume_detach(volume=each)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ({"lvcreate": '  Volume group "vg0" has insufficient free space (2 extents): 4 required.'}, HostBusy, "2 extents"),
        ({"lvcreate": "  device-mapper: reload ioctl failed: No such device"}, TransientError, "reload ioctl failed"),
        ({"lvs": '  Volume group "vg0" not found'}, HostError, "not found"),
        ({"lvs": "  Can't get lock for vg0"}, TransientError, "get lock"),
        ({"lvs": "garbage"}, TransientError, "cannot be understood"),
        ({"lvs": "hang"}, TransientError, "no answer within"),
        ({"lvremove": "  Logical volume vg0/x in use."}, TransientError, "cannot be removed"),
    ],
)
def test_what_lvm_says_is_a_verdict(
    vg: FakeLvm, volume: Volume, fault: dict[str, str], kind: type, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "_ASK_S", 0.5)
    if "lvremove" in fault:
        lvm.wnodes_volume_attach(volume=volume)
    vg.fault(**fault)
    with pytest.raises(kind) as caught:
        lvm.wnodes_volume_attach(volume=volume)
    assert type(caught.value) is kind and said in caught.value.message
    vg.fault()
    lvm.wnodes_volume_detach(volume=volume)
    assert not vg.ours() and not os.path.exists(volume.node)


def test_no_lvm_no_pool_and_a_pool_that_does_not_zero_are_the_hosts_fault(
    vg: FakeLvm, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="vg0/none is no thin pool"):
        lvm.wnodes_volume_attach(volume=replace(volume, pool="none"))
    with pytest.raises(HostError, match="vg0/root is no thin pool"):
        lvm.wnodes_volume_attach(volume=replace(volume, pool="root"))
    vg.pool(zero=False)
    with pytest.raises(HostError, match="hands out chunks with what others wrote") as caught:
        lvm.wnodes_volume_attach(volume=thin(volume))
    assert caught.value.hint == "lvchange --zero y vg0/pool"
    monkeypatch.setattr(command, "PATH", "/nowhere")
    with pytest.raises(HostError, match="no LVM here"):
        lvm.wnodes_volume_attach(volume=volume)


def test_strangers_volumes_are_never_touched(vg: FakeLvm, volume: Volume) -> None:
    """Not one of our name without our tags, nor another wnodesd's in a group that both see."""
    vg.stranger(volume.name)
    vg.stranger("wnodes-other", "wnodes", "wnodes.ffffffffffff")
    before = vg.names()
    assert lvm.wnodes_volume_detach(volume=volume) is True
    with pytest.raises(TransientError, match="exists and is not ours"):
        lvm.wnodes_volume_attach(volume=volume)
    assert lvm.wnodes_volume_list("vg0", OWNER, "/nowhere") == []
    assert vg.names() == before and not any(line.startswith("lvremove") for line in vg.transcript())


def test_a_user_who_keeps_a_volume_open_is_ended_and_others_are_told(vg: FakeLvm, volume: Volume) -> None:
    lvm.wnodes_volume_attach(volume=volume)
    argv = [sys.executable, "-c", f"import time; f = open({volume.node!r}, 'rb'); print(flush=True); time.sleep(60)"]
    mine = subprocess.Popen(["/usr/bin/python3", *argv[1:]], user=UID, group=UID, extra_groups=[], stdout=subprocess.PIPE)
    roots = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert mine.stdout and roots.stdout and mine.stdout.readline() and roots.stdout.readline()
        vg.fault(lvremove="  Logical volume vg0/x in use.")
        with pytest.raises(TransientError, match=rf"open in process {roots.pid} \(uid 0\)"):
            lvm.wnodes_volume_detach(volume=volume)
        assert mine.wait(5) == -9 and roots.poll() is None
    finally:
        for each in (mine, roots):
            each.kill()
            each.communicate()
    vg.fault()
    lvm.wnodes_volume_detach(volume=volume)
    assert not vg.ours()


def test_the_doctor_tells_of_a_pool_that_queues(vg: FakeLvm) -> None:
    assert lvm.problems("vg0", "") == lvm.problems("vg0", "pool") == []
    vg.pool(when_full="queue")
    ((seen, advice),) = lvm.problems("vg0", "pool")
    assert "queues writes" in seen and advice == "lvchange --errorwhenfull y vg0/pool"


def test_a_wipe_has_time_by_its_size(vg: FakeLvm, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    vg.fault(blkdiscard="hang")
    monkeypatch.setattr(lvm, "_WIPE_S", 0.2)
    began = time.monotonic()
    with pytest.raises(TransientError, match="could not be wiped"):
        lvm.wnodes_volume_attach(volume=volume)
    assert time.monotonic() - began < 10
    vg.fault()
    lvm.wnodes_volume_detach(volume=volume)
