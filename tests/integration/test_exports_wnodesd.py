"""Exports in wnodesd's hands: granted with the plan, kept over restarts, taken back with the lease, whoever dies when."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_network_wnodesd import NetNode  # noqa: E402
from wnodesd_harness import UID, ended, python_fixture, until  # noqa: E402, F401 - fixtures

from wnodes_core import processes  # noqa: E402
from wnodes_core.errors import TransientError  # noqa: E402
from wnodes_core.storage.nfs_serve import SERVER  # noqa: E402
from wnodes_core.testing.nfs_client import NfsClient  # noqa: E402

pytestmark = pytest.mark.net


class NfsNode(NetNode):
    """A worker node with two folders of the jobs' user, which guests want mounted."""

    def __init__(self, python: str) -> None:
        super().__init__(python)
        self.sources = [self.folder / "one", self.folder / "two"]
        for each in self.sources:
            each.mkdir()
            os.chown(each, UID, UID)

    def run_vm(self, job: str = "7", network: str = "lan") -> dict[str, Any]:
        mounts = [{"source": str(each), "target": f"/{each.name}", "read_only": False} for each in self.sources]
        self.prepare(job, network=network, mounts=mounts)
        step = self.step(job)
        step.launch()
        reply: dict[str, Any] = step.expect("reply", "child")["reply"]["reply"]
        return reply

    def gateways(self) -> list[processes.Process]:
        """Of all leases of this node: by the network namespace that they are in."""
        ours = os.stat(self.space.path).st_ino
        found = [each for each in processes.table() if each.uid == 0 and each.command[:1] == (SERVER,)]
        with suppress(FileNotFoundError):
            return [each for each in found if os.stat(f"/proc/{each.pid}/ns/net").st_ino == ours]
        return self.gateways()


@pytest.fixture
def node(python: str) -> Iterator[NfsNode]:
    made = NfsNode(python)
    yield made
    made.close()


def test_exports_come_with_the_plan_outlive_the_daemon_and_go_with_the_lease(node: NfsNode) -> None:
    node.start()
    first, second = (node.run_vm(job)["plan"] for job in ("7", "8"))
    assert [each["port"] for plan in (first, second) for each in plan["exports"].values()] == [256, 257, 258, 259]
    export = first["exports"]["0"]
    assert export == {"port": 256, "path": "/share", "node": "169.254.77.1", "local": first["port"]["local"]}
    assert len(node.gateways()) == 4
    with pytest.raises(OSError):  # by the rules, before the gateway itself would say no
        node.space.run(NfsClient, "169.254.77.1", 256, timeout_s=0.5)
    node.kill()
    node.start()
    node.finish("7")
    until(lambda: len(node.gateways()) == 2, "the first lease's are gone")
    assert [each.command[-1] for each in node.gateways()] == [
        f"/run/ganesha/{second['lease']}-{index}.pid" for index in (0, 1)
    ]
    assert [each["port"] for each in node.run_vm("9")["plan"]["exports"].values()] == [256, 257]
    for job in ("8", "9"):
        node.finish(job)
    until(lambda: not node.left(), "all are undone")
    assert node.gateways() == [] and node.ports() == []


def test_a_source_that_is_not_the_user_s_is_told_and_leaves_nothing(node: NfsNode) -> None:
    node.start()
    node.sources[0].chmod(0o700)
    os.chown(node.sources[0], 0, 0)
    node.sources[1].rmdir()
    node.sources[1].symlink_to("/root")
    exports = node.run_vm()["plan"]["exports"]
    assert all("Permission denied" in each["problem"] for each in exports.values()), exports
    assert node.gateways() == []
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert node.ports() == []


@pytest.mark.parametrize("line", range(8, 16))
def test_kill_9_after_a_journal_line_leaves_no_export_and_hurts_no_other(node: NfsNode, line: int) -> None:
    node.start()
    other = node.run_vm("8")["plan"]["lease"]
    node.kill()
    node.start(crash_at=line)
    child = 0
    with suppress(TransientError):
        node.prepare(network="lan", mounts=[{"source": str(node.sources[0]), "target": "/one", "read_only": True}])
        step = node.step()
        step.launch()
        child = step.child_if_any()
        node.finish()
    assert node.daemon is not None
    assert node.daemon.wait(10) == -signal.SIGKILL, "the journal has fewer lines: lower the range"
    node.start()
    node.finish()
    until(lambda: len(node.gateways()) == 2, "its export is gone")
    assert all(other in each.command[-1] for each in node.gateways())
    assert not child or ended(child)
    node.finish("8")
    until(lambda: not node.gateways(), "the other's is gone")
