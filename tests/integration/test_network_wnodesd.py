"""Ports in wnodesd's hands: granted with the plan, kept over restarts, removed with the lease, whoever dies when."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from netns_kit import Namespace  # noqa: E402
from wnodesd_harness import Node, ended, python_fixture, until  # noqa: E402, F401 - fixtures

from wnodes_core.errors import TransientError  # noqa: E402
from wnodes_core.network.links import links  # noqa: E402

pytestmark = pytest.mark.net
LAN = {"name": "lan", "uplink": "eth1", "range": ["10.42.7.0/29"], "subnet": ["10.42.0.0/16"], "gateway": ["10.42.0.1"]}
TORN = {"name": "torn", "uplink": "eth9"}


class NetNode(Node):
    """A worker node whose wnodesd runs in a network namespace."""

    def __init__(self, python: str) -> None:
        super().__init__(python)
        self.space = Namespace()
        self.space.sh("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "far1")
        # As a program, because the harness starts the daemon by its name.
        self.python = str(self.folder / "python")
        Path(self.python).write_text(f'#!/bin/sh\nexec nsenter --net={self.space.path} {python} "$@"\n')
        Path(self.python).chmod(0o755)

    def start(self, **config: Any) -> None:
        super().start(networks=[LAN, TORN], **config)

    def ports(self) -> list[str]:
        """What of ours is there: devices, rules."""
        found = [name for name in self.space.run(links) if name.startswith(("wnt", "wnb"))]
        return found + self.space.sh("nft", "list", "tables").splitlines()

    def run_vm(self, job: str = "7", network: str = "lan") -> dict[str, Any]:
        """The grant that the job's launcher got; its keeper holds the lease."""
        self.prepare(job, network=network)
        step = self.step(job)
        step.launch()
        heard = step.expect("reply", "child") if network == "lan" else step.expect("reply")
        return heard["reply"]["reply"]

    def close(self) -> None:
        super().close()
        self.space.close()


@pytest.fixture
def node(python: str) -> Iterator[NetNode]:
    made = NetNode(python)
    yield made
    made.close()


def test_the_port_comes_with_the_plan_and_goes_with_the_lease(node: NetNode) -> None:
    node.start()
    plan = node.run_vm()["plan"]
    device = plan["port"]["device"]
    assert plan["nic"]["device"] == device
    assert plan["nic"]["addresses"] == ["10.42.7.1/16", "169.254.80.1/32"]
    assert device in node.space.run(links)
    assert "uid" not in plan["nic"]
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert node.ports() == []


def test_ports_outlive_the_daemon_and_are_not_given_twice(node: NetNode) -> None:
    node.start()
    first = node.run_vm("7")["plan"]["port"]
    node.kill()
    node.start()
    second = node.run_vm("8")["plan"]["port"]
    assert (first["addresses"], second["addresses"]) == (["10.42.7.1/16"], ["10.42.7.2/16"])
    node.finish("7")
    found = node.space.run(links)
    assert second["device"] in found and first["device"] not in found
    node.finish("8")
    until(lambda: not node.left(), "both are undone")
    assert node.ports() == []


def test_the_sweeper_mends_a_bridge_that_was_deleted(node: NetNode) -> None:
    node.start(sweep_s=0.3)
    device = node.run_vm()["plan"]["port"]["device"]
    bridge = node.space.run(links)[device].master
    node.space.sh("ip", "link", "del", bridge)
    until(lambda: node.space.run(links)[device].master == bridge, "the bridge is there again")
    node.space.sh("nft", "flush", "ruleset")
    until(lambda: len(node.space.sh("nft", "list", "tables").splitlines()) == 3, "the rules are there again")
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert node.ports() == []


def test_a_node_without_the_uplink_sends_the_job_back_and_keeps_nothing(node: NetNode) -> None:
    node.start()
    other = node.run_vm("8")["plan"]["port"]
    answer = node.run_vm("7", "torn")
    assert answer["error"]["kind"] == "TransientError"
    assert answer["error"]["message"] == "network 'torn': this node has no device 'eth9'"
    until(lambda: node.state_of(next(each["id"] for each in node.leases() if each["job_id"] == "7")) == "over", "it ends")
    assert {name for name in node.space.run(links) if name.startswith("wnt")} == {other["device"]}
    node.finish("7")
    node.finish("8")
    until(lambda: not node.left(), "both are undone")
    assert node.ports() == []


@pytest.mark.parametrize("line", range(1, 22))
def test_kill_9_after_every_journal_line_leaves_no_port_and_hurts_no_other(node: NetNode, line: int) -> None:
    node.start()
    other = node.run_vm("8")["plan"]["port"]["device"]
    node.kill()
    node.start(crash_at=line)
    child = 0
    with suppress(TransientError):
        node.prepare(network="lan")
        step = node.step()
        step.launch()
        child = step.child_if_any()
        node.finish()
    assert node.daemon is not None
    assert node.daemon.wait(10) == -signal.SIGKILL, "the journal has fewer lines: lower the range"
    node.start()
    node.finish()
    until(lambda: len({name for name in node.ports() if name.startswith("wnt")}) == 1, "its port is gone")
    assert node.space.run(links)[other].master.startswith("wnb")
    assert not child or ended(child)
    node.finish("8")
    until(lambda: not node.left(), f"nothing is left, found {node.left()}")
    assert node.ports() == []
