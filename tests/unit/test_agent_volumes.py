"""Volumes of leases in wnodesd: the journal, the undo, leftovers, kill -9 after every line. LVM is a fake here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core import command
from wnodes_core.agent import leases
from wnodes_core.agent.ending import ORDER, Undoer
from wnodes_core.agent.volumes import Volumes, owner_of
from wnodes_core.errors import HostBusy, TransientError, WnodesError
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Disk, Job, VmRequest
from wnodes_core.plan import Plan
from wnodes_core.plugins import Plugins
from wnodes_core.settings.scratch import ScratchSettings

sys.path.insert(0, str(Path(__file__).parent.parent))
from lvm_kit import FakeLvm, fake_lvm  # noqa: E402

UID = 64321


class Node:
    """A wnodesd's volumes, with leases in a folder."""

    def __init__(self, folder: Path, vg: FakeLvm) -> None:
        self.folder, self.vg = folder, vg
        self.state, self.run = str(folder / "state"), str(folder / "run")
        self.settings = ScratchSettings(volume_group="vg0")
        self.plugins = Plugins(builtins=("wnodes_core.storage.lvm",), scan=False)
        self.nodes = f"/dev/wnodes-test-{os.getpid()}"
        self.restart()

    def restart(self) -> None:
        self.volumes = Volumes(lambda: self.settings, lambda: self.plugins.hook, self.state, self.nodes)
        store = SimpleNamespace(release=lambda lease: None)
        self.undoer = Undoer(store, lambda lease: None, {"volume": self.volumes})

    def lease(self, job: str = "7", scratch_mib: int | None = 8, journal: type[Journal] = Journal) -> leases.Lease:
        leases.folders(self.state, self.run)
        facts = Job("fake", job, "n0", UID, UID, "u")
        return leases.create(facts, VmRequest(image="i", scratch_mib=scratch_mib), self.state, self.run, journal)

    def journals(self) -> list[Path]:
        return sorted(Path(self.state, "journal").glob("*.jsonl"))

    def left(self) -> list[str]:
        return [*map(str, self.journals()), *self.vg.ours(), *map(str, Path(self.nodes).glob("*/*"))]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    with fake_lvm(tmp_path / "bin") as vg:
        monkeypatch.setattr(command, "PATH", f"{vg.folder}:{command.PATH}")
        made = Node(tmp_path, vg)
        yield made
        for path in sorted(Path(made.nodes).glob("**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if os.path.exists(made.nodes):
            os.rmdir(made.nodes)


def test_a_lease_without_scratch_or_a_node_without_volumes_gets_none(node: Node) -> None:
    assert node.volumes.attach(node.lease(scratch_mib=None)) == {}
    node.settings = ScratchSettings()
    lease = node.lease("8")
    assert node.volumes.attach(lease) == {}
    assert not [each for each in lease.journal.open_resources if each.kind == "volume"]
    assert node.vg.transcript() == []


def test_the_plan_names_the_node_and_the_undo_leaves_nothing(node: Node) -> None:
    lease = node.lease()
    part = node.volumes.attach(lease)
    path = f"{node.nodes}/{owner_of(node.state)}/wnodes-{lease.id}"
    assert part == {"scratch": vars(Disk(path, "raw", serial="scratch", size_mib=8, block=True))}
    assert os.stat(path).st_uid == UID
    assert ORDER.index("keeper") < ORDER.index("volume") < ORDER.index("folder")
    assert node.undoer.undo(lease, job_over=True) == []
    assert node.left() == []
    assert "scratch" in Plan.__dataclass_fields__


def test_intent_is_in_the_journal_before_lvm_is_asked(node: Node) -> None:
    lease, seen = node.lease(), []

    class Watch:
        def wnodes_volume_attach(self, volume: Any) -> bool:
            seen.extend(each.kind for each in lease.journal.open_resources)
            return True

    Volumes(lambda: node.settings, lambda: Watch(), node.state, node.nodes).attach(lease)
    assert seen[0] == "volume"


@pytest.mark.parametrize("line", range(1, 9))
def test_kill_9_after_every_line_leaves_nothing_and_hurts_no_other(node: Node, line: int) -> None:
    other = node.lease("8")
    node.volumes.attach(other)

    class Crashing(Journal):
        lines = 0

        def _append(self, op: str, resource: Resource) -> None:
            super()._append(op, resource)
            Crashing.lines += 1
            if Crashing.lines == line:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        node.volumes.attach(node.lease(journal=Crashing))
        os._exit(0)
    ended = os.waitpid(pid, 0)[1]
    assert (ended == signal.SIGKILL) == (line <= 8), "making and made of lease, folder, marker and volume, one save"
    node.restart()
    for path in node.journals():
        lease = leases.load(path, Journal)
        if lease and lease.id != other.id:
            assert node.undoer.undo(lease, job_over=True) == []
    assert node.vg.ours() == {f"wnodes-{other.id}"} and len(node.journals()) == 1
    assert node.undoer.undo(other, job_over=True) == []
    assert node.left() == []


def test_one_that_cannot_be_removed_is_reported_tried_again_and_blocks_nobody(node: Node) -> None:
    stuck, other = node.lease(), node.lease("8")
    for each in (stuck, other):
        node.volumes.attach(each)
    node.vg.fault(lvremove="  Logical volume vg0/x in use.")
    (error,) = node.undoer.undo(stuck, job_over=False)[:1]
    assert isinstance(error, TransientError) and "cannot be removed" in error.message
    assert [each.kind for each in stuck.journal.open_resources if each.kind == "volume"] == ["volume"]
    node.vg.fault()
    assert node.undoer.undo(other, job_over=True) == []
    assert node.undoer.undo(stuck, job_over=True) == []
    assert node.left() == []


def test_no_room_is_a_verdict_and_leaves_nothing(node: Node) -> None:
    lease = node.lease(scratch_mib=104)
    with pytest.raises(HostBusy, match="insufficient free space"):
        node.volumes.attach(lease)
    assert node.undoer.undo(lease, job_over=True) == []
    assert node.left() == []


def test_leftovers_are_swept_and_leases_and_strangers_are_not(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    kept, lost, torn = node.lease(), node.lease("8"), node.lease("9")
    for each in (kept, lost, torn):
        node.volumes.attach(each)
    node.vg.stranger("wnodes-other", "wnodes", "wnodes.ffffffffffff")
    os.unlink(lost.journal.path)
    node.vg.fault(lvs="  Can't get lock for vg0")
    node.volumes.sweep(lambda: [])  # LVM does not answer: nothing goes
    node.vg.fault()
    before = node.vg.ours()
    node.volumes.sweep(lambda: [path.stem for path in node.journals()])
    assert before - node.vg.ours() == {f"wnodes-{lost.id}"}
    node.vg.fault(lvremove="  Logical volume vg0/x in use.")
    os.unlink(torn.journal.path)
    node.volumes.sweep(lambda: [kept.id])  # an error is logged, and the next sweep tries again
    node.vg.fault()
    node.volumes.sweep(lambda: [kept.id])
    assert node.vg.ours() == {f"wnodes-{kept.id}", "wnodes-other"}
    assert "in use" in caplog.text
    stray = Path(node.nodes, owner_of(node.state), "wnodes-gone")
    stray.touch()
    node.volumes.sweep(lambda: [kept.id])
    assert not stray.exists(), "a node without a volume would soon name another's"
    assert node.undoer.undo(kept, job_over=True) == []


def test_a_lease_that_came_while_the_list_was_made_is_known(node: Node) -> None:
    """The list is old when it is compared: whoever was not in it then has no volume in it."""
    lease = node.lease()
    node.volumes.attach(lease)
    node.volumes.sweep(lambda: [path.stem for path in node.journals()])
    assert node.vg.ours() == {f"wnodes-{lease.id}"}
    assert node.undoer.undo(lease, job_over=True) == []


def test_what_no_plug_in_knows_is_not_forgotten(node: Node) -> None:
    lease = node.lease()
    node.volumes.attach(lease)
    node.plugins, old = Plugins(builtins=(), scan=False), node.plugins
    (error, *_) = node.undoer.undo(lease, job_over=False)
    assert isinstance(error, WnodesError) and "no plug-in knows" in error.message
    with pytest.raises(WnodesError, match="no plug-in makes"):
        node.volumes.attach(node.lease("8"))
    node.plugins = old
    for path in node.journals():
        found = leases.load(path, Journal)
        assert found and node.undoer.undo(found, job_over=True) == []
    assert node.left() == []


def test_two_daemons_of_one_machine_are_two_owners() -> None:
    assert owner_of("/var/lib/wnodes") == owner_of("/var/lib/wnodes") != owner_of("/var/lib/wnodes2")
