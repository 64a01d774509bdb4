"""wnodesd and second accounts: a keeper that lies, hands over what is no port, or asks a thousand times; a wnodesd that dies.

The keeper is a stand-in, so that it can lie; the gateways are real, as are the accounts.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import UID, Node, ended, python_fixture, until  # noqa: E402, F401 - fixtures

from wnodes_core import processes  # noqa: E402
from wnodes_core.agent import homes  # noqa: E402
from wnodes_core.errors import TransientError  # noqa: E402
from wnodes_core.testing.site import make_user  # noqa: E402

ALICE, BOB = "wnodes-t2", "wnodes-t3"


class Pilots(Node):
    """A node where user ``u`` may become alice; alice has two folders."""

    def __init__(self, python: str) -> None:
        super().__init__(python)
        self.alice = pwd.getpwnam(make_user(ALICE))
        make_user(BOB)
        self.home, self.data = self.folder / "home", self.folder / "data"
        for each in (self.home, self.data):
            each.mkdir(mode=0o700)
            shutil.chown(each, ALICE)

    def start(self, *, mounts: tuple[str, ...] | None = None, **config) -> None:
        places = [str(self.home), f"{self.data}:/data:ro"] if mounts is None else list(mounts)
        policy = [{"users": ["u"], "may_become": [ALICE]}, {"users": [ALICE, BOB], "mounts": places}]
        self.live.write_text("7 8")
        super().start(policy=policy, **config)

    def hold(self, job: str = "7", ports: int = 4) -> dict:
        """A lease whose keeper waits for questions."""
        self.call(op="prepare", lrms="fake", request={"image": "known", "spare_mounts": ports}, job={
            "lrms": "fake", "job_id": job, "node": "n0", "uid": UID, "gid": UID, "user": "u" if job == "7" else "other"})  # fmt: skip
        step = self.step(job)
        step.launch(how="become")
        lease = step.expect("reply", "child")["reply"]["reply"]
        until(lambda: os.path.exists(f"{lease['folder']}/ask.sock"), "the keeper")
        until(lambda: self.state_of(lease["lease"]) == "running", "running")
        return lease

    def ask(self, lease: dict, account: object = ALICE, *, hand: str = "ports", **wanted) -> dict:
        """wnodesd's last word to the keeper."""
        message = {"account": account, **wanted.pop("message", {})}
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(f"{lease['folder']}/ask.sock")
            sock.sendall(json.dumps({"message": message, "hand": hand, **wanted}).encode() + b"\n")
            return json.loads(sock.makefile("rb").readline())[-1]

    def gateways(self) -> list[processes.Process]:
        marks = (str(self.home), str(self.data))
        found = [p for p in processes.table() if any(mark in word for word in p.command for mark in marks)]
        return [p for p in found if p.uid == self.alice.pw_uid]


    def serving(self) -> list[processes.Process]:
        """Both of alice's; one that is just being exec'ed has no argv yet."""
        return until(lambda: len(found := self.gateways()) == 2 and found, "two gateways")


@pytest.fixture
def node(python: str):
    made = Pilots(python)
    yield made
    left = made.gateways()
    for each in left:
        processes.kill(each)
    made.close()


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of the test's own."""
    each = next(each for each in homes.hierarchies(os.getpid()) if each.controllers != ("cpuset",))
    folder = Path(each.folder(each.path), f"wnodes-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    until(lambda: not (folder / "cgroup.procs").read_text(), "the end of what was in it")
    folder.rmdir()


def test_gateways_are_the_account_s_and_end_with_the_lease(group: Path, node: Pilots) -> None:
    node.start()
    lease = node.hold()
    (keeper,) = {each["keeper_pid"] for each in node.leases()}
    (group / "cgroup.procs").write_text(str(keeper))
    assert node.ask(lease) == {"ok": True, "served": 2}
    first = node.serving()
    assert Path(f"/proc/{first[0].pid}/cgroup").read_text() == Path(f"/proc/{keeper}/cgroup").read_text()
    assert node.ask(lease)["ok"]
    node.serving()
    assert not any(processes.alive(each) for each in first)
    assert [each["accounts"] for each in node.leases()] == [{ALICE: node.alice.pw_uid}]
    assert b'"account": "wnodes-t2"' in node.log.read_bytes()
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert not node.gateways()


@pytest.mark.parametrize("account", ["root", "0", "1002", BOB, "../x", f"{ALICE}\n", f"{ALICE}\x00", "daemon", "@wheel", "", None, 7, {}, "x" * 40000])
def test_an_account_that_is_not_sanctioned_gets_nothing(node: Pilots, account: object) -> None:
    node.start()
    answer = node.ask(node.hold(), account)
    assert not answer["ok"] and f"account {str(account)[:70]!r}" in answer["error"]["message"] and len(answer["error"]["message"]) < 400
    assert not node.gateways() and node.call(op="status")["ok"]


def test_what_the_keeper_says_of_job_uid_or_mounts_decides_nothing(node: Pilots) -> None:
    node.start()
    node.hold()
    lease = node.hold("8")  # whose user no rule names
    lies = {"uid": 0, "user": "u", "job": {"user": "u"}, "policy": [], "mounts": [{"source": "/", "target": "/x"}]}
    answer = node.ask(lease, message=lies)
    assert not answer["ok"] and "job 8 of 'other'" in answer["error"]["message"] and f"may_become: [{ALICE}]" in answer["error"]["hint"]
    assert not node.gateways()


def test_only_the_keeper_that_holds_the_lease_may_ask(node: Pilots) -> None:
    node.start()
    mine, other = node.hold(), node.hold("8")
    assert not node.ask(mine, message={"token": "0" * 64})["ok"]
    assert not node.ask(other, message={"lease": mine["lease"]})["ok"]
    stolen = {"lease": mine["lease"], "token": mine["token"]}  # a process of the same user's with the right token
    assert "not yours" in node.ask(other, message=stolen)["error"]["message"]
    step = node.step()
    step.launch(how=json.dumps({"op": "become", "account": ALICE, **stolen}))  # nor one of the very job's
    assert "not yours" in str(step.expect("answer"))
    assert not node.gateways()
    assert node.ask(mine)["ok"], "and the keeper may"


@pytest.mark.parametrize(("hand", "more"), [("file", 0), ("unconnected", 0), ("tcp", 0), ("ports", -1), ("ports", 1), ("ports", -2)])
def test_what_is_no_port_is_refused(node: Pilots, hand: str, more: int) -> None:
    node.start()
    lease = node.hold()
    fds = len(os.listdir(f"/proc/{node.daemon.pid}/fd"))
    answer = node.ask(lease, hand=hand, more=more)
    assert not answer["ok"] and answer["error"]["kind"] == "BadRequest", answer
    assert not node.gateways()
    until(lambda: len(os.listdir(f"/proc/{node.daemon.pid}/fd")) <= fds, "no file stays open")
    assert node.ask(lease)["ok"], "what is one is not"


def test_one_mount_is_served_anew_and_the_other_stays(node: Pilots) -> None:
    """However often it is asked for, and whether its gateway has ended or not. Mounts are in the order of their targets."""
    node.start()
    lease = node.hold(ports=2)
    assert node.ask(lease)["ok"]
    first = {str(node.data) in each.command: each for each in node.serving()}
    processes.kill(first[True])
    for _ in range(2):
        assert node.ask(lease, message={"only": [0]}, more=-1) == {"ok": True, "served": 1}
        now = {str(node.data) in each.command: each for each in node.serving()}
        assert now[False].pid == first[False].pid and now[True].pid != first[True].pid
        first = now
    assert b'"event": "again"' in node.log.read_bytes() and b"mounts [0] served anew" in node.log.read_bytes()
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert not node.gateways()


def test_what_is_no_mount_of_the_account_s_is_not_served(node: Pilots) -> None:
    node.start()
    lease = node.hold()
    for only in ([], [2], [-1], [True], ["1"], [[]], "1", {}, 1, [0, 1, 2], [1e300]):
        answer = node.ask(lease, message={"only": only})
        assert not answer["ok"] and "it has 2 mounts" in answer["error"]["message"], (only, answer)
    assert not node.gateways()
    assert node.ask(lease, message={"only": [1, 1]}, more=-1) == {"ok": True, "served": 1}


def test_a_source_is_judged_with_the_account_s_rights(node: Pilots) -> None:
    (node.folder / "closed").mkdir(mode=0o700)
    node.start(mounts=(f"{node.folder}/closed:/closed",))
    answer = node.ask(node.hold())
    assert answer["error"]["kind"] == "MountDenied" and "Permission denied" in answer["error"]["message"]
    node.finish()
    until(lambda: not node.left(), "the lease is undone")


def test_a_wnodesd_that_systemd_has_shut_in_says_so_and_serves_no_read_only_files(node: Pilots) -> None:
    node.prefix = ["unshare", "--mount"]
    node.start()
    answer = node.ask(node.hold())
    assert not answer["ok"] and "--print-drop-in files" in answer["error"]["hint"]
    assert not node.gateways()


def test_more_mounts_than_ports_are_refused_and_named(node: Pilots) -> None:
    node.start(mounts=tuple(f"{node.home}:/m{n}" for n in range(5)))
    answer = node.ask(node.hold())
    assert answer["error"]["kind"] == "LimitExceeded" and "become_ports" in answer["error"]["hint"]
    assert not node.gateways()


def test_the_vm_s_own_ports_count_whatever_the_policy_says_since(node: Pilots) -> None:
    node.start()
    answer = node.ask(node.hold(ports=1))
    assert answer["error"]["kind"] == "LimitExceeded" and "no free port" in answer["error"]["message"]
    assert not node.gateways()


def test_a_thousand_questions_cost_no_more_than_one(node: Pilots) -> None:
    node.start()
    lease = node.hold()
    with ThreadPoolExecutor(16) as pool:
        bad = list(pool.map(lambda n: node.ask(lease, BOB), range(1000)))
        good = list(pool.map(lambda n: node.ask(lease), range(20)))
    assert not any(each["ok"] for each in bad)
    assert {each.get("error", {}).get("kind") for each in good} <= {None, "LimitExceeded"} and any(each["ok"] for each in good)
    node.serving()
    assert node.ask(lease)["ok"] and node.call(op="status")["ok"]


def test_they_outlive_wnodesd_and_end_with_the_lease_of_the_next(node: Pilots) -> None:
    node.start()
    lease = node.hold()
    assert node.ask(lease)["ok"]
    served = node.serving()
    node.kill()
    assert all(processes.alive(each) for each in served)
    node.start()
    until(lambda: node.state_of(lease["lease"]) == "running", "held again")
    node.finish()
    until(lambda: not node.left(), "the lease is undone")
    assert not node.gateways()


@pytest.mark.parametrize("line", [1, 2, 3, 4])
def test_kill_9_after_a_journal_line_leaves_no_gateway(node: Pilots, line: int) -> None:
    """Lines of an account with two mounts: making, made, making, made; one serves once its second line is written."""
    node.start()
    lease = node.hold()
    journal = node.state / "journal" / f"{lease['lease']}.jsonl"
    lines = journal.read_bytes().count(b"\n")
    node.kill()
    node.start(crash_at=1 + line)
    until(lambda: node.state_of(lease["lease"]) == "running" and journal.read_bytes().count(b"\n") == lines + 1, "held again")
    with suppress(ConnectionError, json.JSONDecodeError):
        assert node.ask(lease) is None
    assert node.daemon.wait(10) == -signal.SIGKILL
    until(lambda: len(node.gateways()) == (line - 1) // 2, "none serves that no journal knows")
    node.start()
    node.finish()
    until(lambda: not node.left(), f"nothing is left, found {node.left()}")
    assert not node.gateways()
    with suppress(TransientError):
        node.finish("8")
    assert ended(node.daemon.pid, 0) is False
