"""A job's second REQUEUE becomes HOLD, over restarts, for a day."""

from __future__ import annotations

from wnodes_core.agent.verdicts import REMEMBER_S, Verdicts, run_name
from wnodes_core.errors import BootTimeout, NoKvm, Verdict
from wnodes_core.model import Owner, Process


def test_the_second_requeue_of_a_job_becomes_hold_for_a_day(tmp_path):
    now = [1000.0]
    path = tmp_path / "requeues.json"
    first = Verdicts(path, lambda: now[0])
    error = BootTimeout("no answer", hint="look")
    assert first.bound(error, "job", "lease1") is error
    assert first.bound(error, "job", "lease1") is error  # the same failure, told to another task
    after_restart = Verdicts(path, lambda: now[0])
    second = after_restart.bound(error, "job", "lease2")
    assert (second.verdict, second.hint) == (Verdict.HOLD, "look")
    assert second.message.startswith("no answer (the job was requeued")
    assert after_restart.bound(error, "other", "lease3") is error
    now[0] += REMEMBER_S
    assert after_restart.bound(error, "job", "lease4") is error


def test_one_run_of_a_job_is_one_attempt_with_a_lease_or_without(tmp_path):
    """A hook of the user's that could make no lease, and then its task that could, do not use up two requeues."""
    path, error = tmp_path / "requeues.json", BootTimeout("no answer")
    run, again = (run_name(Owner("7", "", Process(pid, 0, 0, 9, "", ()), False)) for pid in (11, 12))
    assert Verdicts(path).bound(error, "job", run) is error
    assert Verdicts(path).bound(error, "job", "lease1", run) is error
    assert Verdicts(path).bound(error, "job", "lease2", again).verdict is Verdict.HOLD
    assert Verdicts(path).bound(error, "other", "lease3", run) is error
    assert Verdicts(path).bound(error, "other", "lease3") is error, "a task that stands elsewhere, the same lease"


def test_hold_and_drain_pass_unchanged_and_leave_no_memory(tmp_path):
    error = NoKvm("none")
    assert Verdicts(tmp_path / "r").bound(error, "job", "a") is error
    assert not (tmp_path / "r").exists()


def test_a_broken_memory_is_an_empty_one(tmp_path):
    for text in ("{", "[1]", '{"job": 1}'):
        (tmp_path / "r").write_text(text)
        assert Verdicts(tmp_path / "r").bound(BootTimeout("x"), "job", "b").verdict is Verdict.REQUEUE
