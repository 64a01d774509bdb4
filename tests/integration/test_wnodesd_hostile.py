"""Clients that lie, shout, stall or come in hundreds; and what an observer of the node may see."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from wnodes_core.errors import from_dict

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import UID, ended, node_fixture, python_fixture, until  # noqa: E402, F401 - fixtures

ASK = """
import json, os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])
sock.sendall(sys.argv[3].encode() + b"\\n")
sys.stdout.write(sock.makefile().readline())
"""


def ask_as(where, uid: int, /, **message):
    argv = ["/usr/bin/python3", "-I", "-c", ASK, where.socket, str(uid), json.dumps(message)]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=20)
    return json.loads(done.stdout)


def raw(node) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(15)
    sock.connect(node.socket)
    return sock


def line_of(sock: socket.socket) -> dict:
    return json.loads(sock.makefile("rb").readline())


def test_only_root_prepares_and_finishes(node):
    node.start()
    job = {"lrms": "fake", "job_id": "7", "node": "n0", "uid": UID, "gid": UID, "user": "u"}
    for message in (
        {"op": "prepare", "lrms": "fake", "request": {"image": "known"}, "job": job},
        {"op": "finish", "lrms": "fake", "job_id": "7", "node": "n0"},
    ):
        reply = ask_as(node, UID, **message)
        assert "does not descend from the batch system" in reply["error"]["message"]  # nor is it root
    assert node.left() == []


def test_a_caller_without_the_ancestry_gets_nothing_even_with_the_right_uid(node):
    node.start()
    node.prepare()
    reply = ask_as(node, UID, op="launch", lrms="fake", job_id="7")
    assert "does not descend from the batch system" in reply["error"]["message"]


def test_another_users_process_in_the_job_gets_nothing(node):
    node.start()
    node.prepare()
    step = node.step()
    step.launch(uid=UID + 1)
    message = step.next()["reply"]["error"]["message"]
    assert message == f"job 7 is of uid {UID}, not of uid {UID + 1}"


def test_a_wrong_token_or_a_foreign_uid_holds_nothing(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch(how="stay")
    token = step.next()["reply"]["token"]
    for uid, claim in ((UID, "0" * 64), (UID, ""), (UID, None), (UID, [token]), (UID + 1, token), (0, token)):
        assert "not yours to hold" in ask_as(node, uid, op="hold", lease=lease, token=claim)["error"]["message"]
    assert node.state_of(lease) == "starting"
    assert token not in (node.state / "journal" / f"{lease}.jsonl").read_text()


def test_users_see_and_release_only_their_own_leases(node):
    node.start()
    lease = node.prepare()
    assert ask_as(node, UID + 1, op="leases")["leases"] == []
    assert not ask_as(node, UID + 1, op="release", lease=lease)["ok"]
    assert [each["id"] for each in ask_as(node, UID, op="leases")["leases"]] == [lease]
    assert ask_as(node, UID, op="release", lease=lease)["ok"]


@pytest.mark.parametrize(
    "line",
    [b"hello\n", b"[1]\n", b"{\n", b"\xff\xfe\n", b"[" * 60000 + b"\n", b'"' + b"x" * 70000 + b'"\n', b"x" * 200000],
    ids=["word", "list", "half-object", "no-utf8", "deep", "giant-line", "giant-no-end"],
)
def test_garbage_gets_an_error_and_the_door(node, line):
    node.start()
    with raw(node) as sock:
        with suppress(BrokenPipeError):
            sock.sendall(line)
        reply = line_of(sock)
        assert from_dict(reply["error"]).__class__.__name__ == "BadRequest"
    assert node.leases() == []


@pytest.mark.parametrize("message", [{}, {"op": []}, {"op": "nix"}, {"op": "launch", "lrms": "../x"}, {"op": "hold"}])
def test_odd_messages_get_an_error_on_a_connection_that_lives_on(node, message):
    node.start()
    with raw(node) as sock:
        file = sock.makefile("rwb")
        for _ in range(2):
            file.write(json.dumps(message).encode() + b"\n")
            file.flush()
            assert not json.loads(file.readline())["ok"]


def test_five_hundred_idle_clients_and_a_reader_that_never_reads_delay_nobody(node):
    node.start()
    idle = [raw(node) for _ in range(500)]
    deaf = raw(node)
    deaf.setblocking(False)
    flood = json.dumps({"op": "x" * 30000}).encode() + b"\n"
    for _ in range(100):
        try:
            deaf.send(flood)
        except BlockingIOError:
            break
    for sock in idle[:250]:
        sock.sendall(b'{"op":')  # and half of them say half a line
    began = time.monotonic()
    node.prepare()
    node.finish()
    assert time.monotonic() - began < 2.0
    for sock in (*idle, deaf):
        sock.close()


def test_metrics_are_served_and_bounded(node):
    node.start()
    node.prepare()
    step = node.step()
    step.launch()
    step.expect("child")

    until(lambda: 'phase_seconds_count{phase="boot"} 1.0' in node.scrape()[1], "the keeper's trace is counted")
    status, text = node.scrape()
    assert status == 200
    assert 'wnodes_leases{state="running"} 1.0' in text
    assert 'wnodes_lease_phase_seconds_count{phase="other"} 1.0' in text  # a keeper's invention
    assert 'wnodes_lease_phase_seconds_count{phase="admit"} 1.0' in text  # ours alone
    assert 'wnodes_lease_start_seconds_sum{kind="cold"} 2.25' in text
    assert 'wnodes_start_fallbacks_total{reason="BootTimeout"} 1.0' in text
    assert "wnodes_templates 0.0" in text and "wnodes_pool_idle 0.0" in text
    (lease,) = node.leases()
    assert [name[:5] for name, _, _ in lease["trace"]] == ["admit", "image", "boot", "first", "xxxxx"]
    assert lease["trace"][0][1] < 0 and lease["trace"][3] == ["first instruction", 2.0, 0.25]
    assert lease["start"] == {"kind": "cold", "way": "", "template": "7", "fallback": "BootTimeout"}
    assert 'wnodes_image_fetches_total{outcome="ok"} 1.0' in text
    assert "wnodes_build_info{version=" in text
    assert node.scrape("/etc/passwd")[0] == 404


def test_the_log_is_one_json_object_a_line_and_a_broken_observer_harms_nobody(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch()
    step.expect("child")
    until(lambda: node.leases()[0]["keeper_state"] == "running", "the keeper has said so")
    node.finish()
    lines = [json.loads(line) for line in node.log.read_text().splitlines()]
    events = [line["event"] for line in lines if line.get("lease") == lease and line["event"] != "image"]
    assert events == ["prepared", "starting", "held", "running", "ending", "gone"]
    assert any("an observer's bug" in line.get("traceback", "") for line in lines)


def test_it_stays_below_60_mib(node):
    node.start()
    for number in range(20):
        node.prepare(str(number))
    step = node.step("3")
    step.launch(count=10)
    step.expect("child")
    status = Path(f"/proc/{node.daemon.pid}/status").read_text()
    rss_kib = int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    print(f"wnodesd: peak {rss_kib / 1024:.1f} MiB resident with 20 leases")
    assert rss_kib < 60 << 10


def test_a_second_daemon_does_not_start(node):
    node.start()
    argv = [*node.daemon.args]
    done = subprocess.run(argv, capture_output=True, timeout=20)
    assert done.returncode
    assert b"another wnodesd runs here" in done.stderr
    assert node.leases() == []


@pytest.fixture
def home():
    """A job's extern step in throw-away cgroups of its own, with one process that is its home."""
    name = f"wnodes-test-{os.getpid()}"
    made = []
    for controller in ("memory", "cpuset", "freezer", "pids"):
        path = Path("/sys/fs/cgroup", controller, name, "job_7", "step_extern")
        for each in (path.parent.parent, path.parent, path):
            each.mkdir()
            made.append(each)
            for file in ("cpuset.cpus", "cpuset.mems"):
                if controller == "cpuset":
                    (each / file).write_text((each.parent / file).read_text())
    argv = ["/usr/bin/python3", "-I", "-c", "import signal; signal.pause()", "fakehome=7"]
    process = subprocess.Popen(argv)
    for path in made[2::3]:
        (path / "cgroup.procs").write_text(str(process.pid))
    yield name, process
    process.kill()
    process.wait()
    for path in reversed(made):
        until(lambda path=path: _removed(path), f"{path} is empty")


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def test_a_vm_that_outlives_its_step_lives_in_the_cgroups_of_the_jobs_home(node, home):
    name, process = home
    node.start()
    lease = node.prepare()
    step = node.step(kind="short")
    step.launch()
    found = step.expect("child", "reply")
    assert found["reply"]["reply"]["home"] == "job"
    groups = Path(f"/proc/{found['child']['pid']}/cgroup").read_text()
    where = {line.split(":")[1]: line.split(":", 2)[2] for line in groups.splitlines()}
    for controller in ("memory", "cpuset", "pids"):
        assert where[controller] == f"/{name}/job_7/step_extern"
    assert where["freezer"] == f"/wnodes/{lease}"
    step.process.kill()  # the step ends; the VM goes on
    assert not ended(found["child"]["child"], 0.1)
    process.kill()  # the job ends
    assert ended(found["child"]["child"])
    until(lambda: node.state_of(lease) == "over", "the lease is undone")
    assert not Path("/sys/fs/cgroup/freezer/wnodes").exists()
    node.finish()
    assert node.left() == []


def test_whatever_hides_in_the_lease_freezer_group_is_ended(node, home):
    node.start()
    lease = node.prepare()
    step = node.step(kind="short")
    step.launch()
    found = step.expect("child")["child"]
    (node.state / "leases" / lease / "journal").unlink()  # the user forgets what the keeper made
    os.kill(found["pid"], 9)
    assert ended(found["child"])
    until(lambda: node.state_of(lease) == "over", "the lease is undone")
