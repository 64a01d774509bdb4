"""A lease's life with a real wnodesd: election, joining, ends, kill -9 of everybody, re-adoption."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from wnodes_core.errors import RequestError, TransientError, UnknownImage, WnodesError
from wnodes_core.model import Image, Shape, Template
from wnodes_core.templates import Wanted

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import UID, ended, node_fixture, python_fixture, until  # noqa: E402, F401 - fixtures


def test_of_five_launchers_one_starts_and_four_join(node):
    node.start()
    lease = node.prepare()
    marker = node.run / "fake" / "7.n0"
    assert marker.read_text().strip() == lease
    assert (marker.stat().st_uid, marker.stat().st_mode & 0o777) == (0, 0o644)
    folder = node.state / "leases" / lease
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (UID, 0o700)
    step = node.step()
    step.launch(count=5)
    said = [step.next() for _ in range(6)]
    roles = sorted(s["reply"]["role"] for s in said if s["role"] == "launcher")
    assert roles == ["join", "join", "join", "join", "start"]
    start = next(s["reply"] for s in said if s["role"] == "launcher" and s["reply"]["role"] == "start")
    assert start["home"] == "step"
    assert start["plan"]["accel"] == "tcg"
    assert node.state_of(lease) == "running"
    assert node.finish() == {"ok": True, "pending": False}
    assert step.expect("ended")["ended"]["ended"] == "the job is over"
    assert node.left() == []
    assert node.finish() == {"ok": True, "pending": False}


@pytest.mark.parametrize("how", ["die", "stay"])
def test_another_launcher_is_elected_when_the_starter_dies(node, how):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch(how=how)
    first = step.next()
    assert first["reply"]["role"] == "start"
    step.launch()
    if how == "stay":
        assert node.state_of(lease) == "starting"
        os.kill(first["pid"], signal.SIGKILL)
    found = step.expect("reply", "hold")
    assert found["reply"]["reply"]["role"] == "start"
    assert found["reply"]["reply"]["token"] != first["reply"]["token"]
    assert found["hold"]["hold"]["ok"]


def test_a_starter_that_brings_no_keeper_loses_its_election(node):
    node.start(hold_timeout_s=0.2)
    node.prepare()
    step = node.step()
    step.launch(how="stay")
    assert step.next()["reply"]["role"] == "start"
    step.launch()
    assert step.expect("reply", "hold")["reply"]["reply"]["role"] == "start"


def test_a_killed_keeper_ends_the_lease_but_the_job_stays_a_vm_job(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch()
    found = step.expect("hold", "child")["child"]
    os.kill(found["pid"], signal.SIGKILL)
    assert ended(found["child"])  # undone as the user, from the keeper's own journal
    until(lambda: node.state_of(lease) == "over", "the lease is undone")
    assert not (node.state / "leases" / lease).exists()
    assert (node.run / "fake" / "7.n0").exists()
    step.launch()
    error = step.next()["reply"]["error"]
    assert "the VM of job 7 has ended: the keeper" in error["message"]
    node.finish()
    assert node.left() == []


def test_the_end_of_the_jobs_root_process_ends_the_lease(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch(how="stubborn")
    found = step.expect("child")["child"]
    node.kill()  # and so also when nobody saw it run
    node.start(grace_s=0.2)
    assert step.expect("rehold")["rehold"]["rehold"]["ok"]
    step.process.kill()
    assert ended(found["pid"])
    assert ended(found["child"])
    until(lambda: node.state_of(lease) == "over", "the lease is undone")
    node.finish()
    assert node.left() == []


def test_a_running_lease_survives_kill_9_of_the_daemon(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch()
    child = step.expect("child")["child"]["child"]
    node.kill()
    assert not ended(child, 0)
    node.start()
    assert step.expect("rehold")["rehold"]["rehold"]["ok"]
    assert node.state_of(lease) == "running"
    step.launch()
    assert step.next()["reply"]["role"] == "join"
    node.finish()
    assert ended(child)
    assert node.left() == []


def test_sigterm_leaves_running_leases_alone(node):
    node.start()
    node.prepare()
    step = node.step()
    step.launch()
    child = step.expect("child")["child"]["child"]
    node.daemon.terminate()
    assert node.daemon.wait(10) == 0
    assert not ended(child, 0)
    with pytest.raises(TransientError, match="does not answer"):
        node.leases()
    node.start()
    assert step.expect("rehold")["rehold"]["rehold"]["ok"]


def test_a_keeper_that_died_with_the_daemon_is_undone_at_the_next_start(node):
    node.start()
    lease = node.prepare()
    step = node.step()
    step.launch()
    found = step.expect("child")["child"]
    node.kill()
    os.kill(found["pid"], signal.SIGKILL)
    node.start()
    assert ended(found["child"])
    until(lambda: node.state_of(lease) == "over", "the lease is undone")


def test_the_sweeper_ends_leases_of_jobs_that_the_batch_system_forgot(node):
    node.live.write_text("7\n")
    node.start(sweep_s=0.1)
    node.prepare("7")
    lease = node.prepare("8")
    until(lambda: node.state_of(lease) == "", "the unknown job's lease is gone")
    assert [each["job_id"] for each in node.leases()] == ["7"]
    node.live.unlink()  # the batch system does not answer: nothing may be concluded
    assert [each["job_id"] for each in node.leases()] == ["7"]


def test_a_waiting_launcher_hears_of_progress_and_gets_the_vm_when_the_image_is_there(node):
    node.start()
    node.prepare(image="slow")
    step = node.step()
    step.launch()
    until(lambda: any(each["state"] == "prepared" for each in node.leases()), "lease")
    signal.sigtimedwait([], 0.6)  # the daemon tells at its own pace
    (node.folder / "slow").touch()
    reply = step.expect("reply")["reply"]
    assert reply["progress"] == ["fetching image slow: 1 of 4 MiB"]
    assert reply["reply"]["role"] == "start"


def test_prepare_is_idempotent_and_a_new_run_replaces_the_old(node):
    node.start()
    lease = node.prepare()
    assert node.prepare() == lease
    step = node.step()
    step.launch()
    child = step.expect("child")["child"]["child"]
    new = node.prepare()
    assert new != lease
    assert ended(child)
    assert [each["id"] for each in node.leases()] == [new]
    assert (node.run / "fake" / "7.n0").read_text().strip() == new


def test_an_unknown_image_is_refused_at_once_and_leaves_nothing(node):
    node.start()
    with pytest.raises(UnknownImage, match="no such image"):
        node.prepare(image="nix")
    assert node.left() == []


@pytest.mark.parametrize("job", [{"job_id": "../x"}, {"uid": "0"}, {"node": "a/b"}, {"nonsense": 1}, {"lrms": "other"}])
def test_odd_job_facts_are_refused(node, job):
    node.start()
    with pytest.raises(WnodesError, match="want|unexpected"):
        node.prepare(**job)
    assert node.left() == []


def test_cached_images_are_advertised_at_start(node):
    node.start()
    until((node.folder / "live.n0,seen-n0,tcg,known").exists, "advertised")


def test_an_image_with_a_template_is_advertised_as_warm_and_counted(node):
    image = Image("known", "", "sha256:" + "0" * 64, "/dev/null", "raw")
    name = Wanted(image, "tcg", 1, 512, 512, "host").id
    folder = node.state / "templates" / name
    folder.mkdir(parents=True)
    template = Template(name, str(folder), "saved", image.digest, "tcg", Shape(1, 512), "", (), {}, 6)
    (folder / "template.json").write_text(json.dumps({"template": asdict(template), "files": {}}))
    node.start()
    until((node.folder / "live.n0,seen-n0,tcg,known,warm_known").exists, "advertised as warm")
    assert "wnodes_templates 1.0\n" in node.scrape()[1]


def test_a_failed_boot_is_requeued_once_and_then_held(node):
    node.start()
    told = []
    for _ in range(2):
        lease = node.prepare()
        step = node.step()
        step.launch(how="fail")
        told.append(step.expect("verdict")["verdict"]["verdict"])
        until(lambda lease=lease: node.state_of(lease) == "over", "the lease is undone")
        step.launch()  # a later task of the same run hears the same
        assert step.next()["reply"]["error"] == told[-1]["error"]
        node.finish()
        node.kill()  # the memory survives this
        node.start()
    assert [each["verdict"] for each in told] == ["requeue", "hold"]
    assert [each["error"]["kind"] for each in told] == ["BootTimeout", "FailedAgain"]


def test_release_by_root_ends_the_lease(node):
    node.start()
    lease = node.prepare()
    node.call(op="release", lease=lease)
    assert node.state_of(lease) == "over"
    with pytest.raises(RequestError, match="no such lease"):
        node.call(op="release", lease="nix")


@pytest.mark.parametrize("line", range(1, 19))
def test_kill_9_after_every_journal_line_leaves_nothing_behind(node, line):
    node.start(crash_at=line)
    step = node.step()
    child = 0
    with suppress(TransientError):
        node.prepare()
        step.launch()
        child = step.child_if_any()
        node.finish()
    assert node.daemon.wait(10) == -signal.SIGKILL, "the journal has fewer lines: lower the range"
    node.start()
    node.finish()
    until(lambda: not node.left(), f"nothing is left, found {node.left()}")
    assert not child or ended(child)
