"""An LRMS whose hooks run as the job's user: such a process prepares, claims and ends what it proved to stand in, and no more."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import UID, node_fixture, python_fixture, until  # noqa: E402, F401 - fixtures


def ask(step, **question):
    step.launch(how=json.dumps(question))
    return step.expect("answer")["answer"]["answer"]


def start(node, step):
    """Launch with a request of its own; the launcher's grant and its keeper's."""
    step.launch(how="image=known:normal")
    found = step.expect("reply", "hold")
    until(lambda: node.state_of(found["reply"]["reply"]["lease"]) == "running", "running")
    return found["reply"]["reply"]


def test_a_user_s_hook_prepares_and_its_job_starts_in_that_lease(node):
    node.start(claims=True)
    node.live.write_text("7")
    step = node.step()
    assert ask(step, op="prepare", request="image=known") == {"ok": True, "pending": True}
    lease = until(lambda: next(iter(node.leases()), None), "lease")
    assert (lease["state"], lease["job_id"], lease["uid"]) == ("prepared", "7", UID)
    again = ask(step, op="prepare", request="image=known", wait=True)
    assert again == {"ok": True, "lease": lease["id"]}
    assert start(node, step)["lease"] == lease["id"]
    assert ask(step, op="prepare", request="image=known", wait=True) == again  # late: it changes nothing
    assert node.state_of(lease["id"]) == "running"


def test_a_job_that_nobody_prepared_claims_its_lease_once_the_batch_system_confirms_it(node):
    node.start(claims=True)
    step = node.step()
    threading.Timer(0.6, lambda: node.live.write_text("7")).start()
    assert start(node, step)["role"] == "start"
    step.launch(how="image=known:normal")
    assert step.expect("reply")["reply"]["reply"]["role"] == "join"


@pytest.mark.parametrize("request_", ["image=unknown", "imge=known", "image=known\n", {"image": "known"}, 5, "image=" + "x" * 9999])
def test_a_bad_request_of_a_user_is_refused_and_leaves_nothing(node, request_):
    node.start(claims=True)
    node.live.write_text("7")
    answer = ask(node.step(), op="prepare", request=request_, wait=True)
    assert not answer["ok"] and "again" not in answer["error"] and node.left() == []


def test_a_job_that_is_not_confirmed_is_sent_back_once(node):
    node.start(claims=True)
    first, second = (ask(node.step(), op="prepare", request="image=known", wait=True)["error"] for _ in range(2))
    assert (first["kind"], first["again"]) == ("TransientError", "yes")
    assert (second["kind"], second.get("again")) == ("FailedAgain", None)
    assert node.left() == []


def test_the_end_of_a_job_is_believed_once_its_root_process_has_ended(node):
    node.start(claims=True)
    node.live.write_text("7")
    old = node.step()
    lease = start(node, old)["lease"]
    late = node.step()  # an END of an earlier run, or from where the user likes
    assert ask(late, op="finish") == {"ok": True, "pending": True}
    time.sleep(0.3)
    assert node.state_of(lease) == "running"
    old.process.kill()
    until(lambda: node.state_of(lease) == "over", "over")
    assert ask(late, op="finish", wait=True) == {"ok": True, "pending": False}
    assert node.left() == []


def test_a_new_run_of_a_job_gets_a_lease_of_its_own_even_while_the_old_is_there(node):
    node.start(claims=True)
    node.live.write_text("7")
    old, new = node.step(), node.step()
    first = start(node, old)["lease"]
    second = start(node, new)["lease"]
    assert first != second and node.state_of(first) == "" and node.state_of(second) == "running"


def test_where_only_root_prepares_a_user_can_neither_prepare_nor_end(node):
    node.start()
    step = node.step()
    assert not ask(step, op="prepare", request="image=known", wait=True)["ok"]
    step.launch(how="image=known:normal")
    assert not step.expect("reply")["reply"]["reply"]["ok"]
    lease = node.prepare()
    answer = ask(step, op="finish")
    assert not answer["ok"] and node.state_of(lease) == "prepared"
    assert (node.run / "fake" / "7.n0").exists()
