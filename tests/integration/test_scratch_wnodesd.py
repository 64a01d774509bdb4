"""Volumes in wnodesd's hands: granted with the plan, kept over restarts, removed with the lease, whoever dies when.

LVM is a fake here, its volumes are loop devices; test_lvm_guest.py has the real one.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from lvm_kit import FakeLvm  # noqa: E402
from wnodesd_harness import UID, Node, ended, python_fixture, until  # noqa: E402, F401 - fixtures

from wnodes_core import command  # noqa: E402
from wnodes_core.agent.volumes import owner_of  # noqa: E402
from wnodes_core.errors import TransientError  # noqa: E402


class LvmNode(Node):
    """A worker node whose wnodesd finds a fake LVM."""

    def __init__(self, python: str) -> None:
        super().__init__(python)
        self.vg = FakeLvm(self.folder / "bin")

    def start(self, **config: Any) -> None:
        self.live.write_text("7 8")
        path = f"{self.vg.folder}:{command.PATH}"
        super().start(path=path, scratch={"volume_group": "vg0"}, **config)

    def run_vm(self, job: str = "7", scratch_mib: int = 8) -> dict[str, Any]:
        """The grant that the job's launcher got; its keeper holds the lease."""
        self.prepare(job, scratch_mib=scratch_mib)
        step = self.step(job)
        step.launch()
        heard = step.expect("reply", "child") if scratch_mib < 100 else step.expect("reply")
        reply: dict[str, Any] = heard["reply"]["reply"]
        return reply

    def close(self) -> None:
        nodes = Path("/dev/wnodes", owner_of(str(self.state)))
        super().close()
        self.vg.close()
        for path in nodes.glob("*"):
            path.unlink()
        if nodes.exists():
            nodes.rmdir()


@pytest.fixture
def node(python: str) -> Iterator[LvmNode]:
    made = LvmNode(python)
    yield made
    made.close()


def test_the_volume_comes_with_the_plan_and_goes_with_the_lease(node: LvmNode) -> None:
    node.start()
    disk = node.run_vm()["plan"]["scratch"]
    (name,) = node.vg.ours()
    assert (disk["path"].rpartition("/")[2], disk["size_mib"], disk["block"]) == (name, 8, True)
    found = os.stat(disk["path"])
    assert found.st_uid == UID and found.st_rdev == os.stat(node.vg.device(name)).st_rdev
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert not node.vg.ours() and not os.path.exists(disk["path"])


def test_a_volume_in_use_outlives_the_daemon(node: LvmNode) -> None:
    node.start()
    path = node.run_vm()["plan"]["scratch"]["path"]
    node.kill()
    node.start(sweep_s=0.2)
    other = node.run_vm("8")["plan"]["scratch"]["path"]  # and several sweeps later
    assert os.path.exists(path) and os.path.exists(other) and len(node.vg.ours()) == 2
    node.finish()
    until(lambda: len(node.vg.ours()) == 1, "the first is undone")
    assert os.path.exists(other) and not os.path.exists(path)
    node.finish("8")
    until(lambda: not node.left(), "both are undone")


def test_a_full_group_sends_the_job_back_and_keeps_nothing(node: LvmNode) -> None:
    node.start()
    answer = node.run_vm(scratch_mib=104)
    assert answer["error"]["kind"] == "HostBusy" and "insufficient free space" in answer["error"]["message"]
    node.finish()
    until(lambda: not node.left(), "it is undone")
    assert not node.vg.ours()


def test_one_that_cannot_be_removed_is_tried_again_and_no_other_waits(node: LvmNode) -> None:
    node.start(sweep_s=0.2)
    node.run_vm()
    (stuck,) = node.vg.ours()
    node.run_vm("8")
    node.vg.fault(lvremove="  Logical volume vg0/x in use.")
    node.finish()
    until(lambda: b"cannot be removed" in node.log.read_bytes(), "it is reported")
    node.vg.fault()
    node.finish("8")
    until(lambda: node.vg.ours() <= {stuck}, "the other is undone")
    until(lambda: not node.left(), "the sweeper has tried again")
    assert not node.vg.ours()


@pytest.mark.parametrize("line", range(7, 16))
def test_kill_9_after_a_journal_line_leaves_no_volume_and_hurts_no_other(node: LvmNode, line: int) -> None:
    node.start()
    other = node.run_vm("8")["plan"]["scratch"]["path"]
    node.kill()
    node.start(crash_at=line)
    child = 0
    with suppress(TransientError):
        node.prepare(scratch_mib=8)
        step = node.step()
        step.launch()
        child = step.child_if_any()
        node.finish()
    assert node.daemon is not None
    assert node.daemon.wait(10) == -signal.SIGKILL, "the journal has fewer lines: lower the range"
    node.start()
    node.finish()
    until(lambda: len(node.vg.ours()) == 1, "its volume is gone")
    assert os.path.exists(other)
    assert not child or ended(child)
    node.finish("8")
    until(lambda: not node.left(), f"nothing is left, found {node.left()}")
    assert not node.vg.ours()
