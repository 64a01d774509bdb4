"""The simulator keeps the contract in the life of a job: PRE_EXEC, signals, limits, requeues, lost daemons.

D: IBM's documents of 10.1. T: observed on a GPL descendant of LSF 4.2. M: from memory.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from lsf_recorder import Recorder
from wnodes_lsf.testing import USER, until

pytestmark = pytest.mark.lsf


def test_eexec_delays_the_job_and_its_failure_is_ignored(cluster: Recorder) -> None:
    """D/T: the parent waits; T: the exit status does not matter."""
    cluster.program(cluster.serverdir / "eexec", "#!/bin/sh\nsleep 1\nexit 3\n")
    began = time.monotonic()
    assert cluster.ended(cluster.bsub("true"))["stat"] == "DONE"
    assert time.monotonic() - began > 1


@pytest.mark.parametrize(("code", "stat"), [("99", "EXIT"), ("0", "DONE")])
def test_pre_exec_99_is_never_again(cluster: Recorder, code: str, stat: str) -> None:
    """D/T: 0 runs, 99 ends; T: no POST_EXEC after a queue's PRE that failed."""
    cluster.program(cluster.folder / "pre", f"#!/bin/sh\nexit {code}\n")
    job = cluster.bsub("-q", "hooked", "echo ran")
    assert cluster.ended(job)["stat"] == stat and cluster.output(job) == ("" if code == "99" else "ran\n")
    time.sleep(0.3)
    assert ("queue-post" in cluster.names()) == (code == "0")


def test_pre_exec_other_codes_go_back_to_the_head_of_the_queue_for_ever(cluster: Recorder) -> None:
    """D/T: PEND again; T: without limit, and nothing passes it on that slot."""
    cluster.program(cluster.folder / "pre", "#!/bin/sh\nexit 1\n")
    job, other = cluster.bsub("-q", "hooked", "true"), cluster.bsub("true")
    until(lambda: cluster.names().count("queue-pre") >= 4, "fourth try")
    assert cluster.show(job)["stat"] in ("PEND", "RUN")
    cluster.program(cluster.folder / "pre", "#!/bin/sh\nexit 0\n")
    assert cluster.ended(job)["stat"] == cluster.ended(other)["stat"] == "DONE"


def test_two_clusters_of_one_machine_never_share_a_job_file(cluster: Recorder) -> None:
    """Both have one ``~/.lsbatch``: what one said of its job there, the other would take for its own job's phase."""
    with tempfile.TemporaryDirectory(prefix="wnodes-lsf-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        with Recorder(Path(name) / "other", release="T") as other:
            ours, theirs = ({each.bsub("true") for _ in range(3)} for each in (cluster, other))
            assert len(ours | theirs) == 6
            ends = [cluster.ended(job) for job in ours] + [other.ended(job) for job in theirs]
            assert {each["stat"] for each in ends} == {"DONE"}


def test_bkill_during_pre_exec_ends_at_once_without_post(cluster: Recorder) -> None:
    """T."""
    cluster.program(cluster.folder / "pre", "#!/bin/sh\nsleep 60\n")
    job = cluster.bsub("-q", "hooked", "true")
    until(lambda: "queue-pre" in cluster.names(), "PRE_EXEC")
    time.sleep(0.2)
    cluster.run_as(USER, ["bkill", job])
    assert cluster.ended(job)["stat"] == "EXIT"
    time.sleep(0.3)
    assert "queue-post" not in cluster.names() and "END" not in cluster.names()


def traps(cluster: Recorder, script: str, *options: str) -> str:
    """A job that is the script's shell itself: ``exec`` removes the job file's level (T)."""
    path = cluster.work / f"traps-{time.monotonic_ns()}"
    cluster.program(path, f"#!/bin/sh\n{script}\n")
    return cluster.bsub(*options, f"exec {path}")


def test_bkill_is_int_then_term_then_kill_in_steps(cluster: Recorder) -> None:
    """D/T: JOB_TERMINATE_INTERVAL between them; ``bkill -s KILL`` is the same, a second bkill shortens nothing (T)."""
    job = traps(cluster, "trap 'echo int' INT; trap 'echo term' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in cluster.output(job), "job")
    began = time.monotonic()
    cluster.run_as(USER, ["bkill", "-s", "KILL", job])
    cluster.run_as(USER, ["bkill", job])
    assert cluster.ended(job)["exit_code"] == "137" and time.monotonic() - began > 0.75
    assert [word for word in cluster.output(job).split() if word in ("int", "term")] == ["int", "term"]
    end = until(lambda: [c for c in cluster.calls("eexec") if c["environ"]["LS_EXEC_T"] == "END"], "END")
    assert end[0]["environ"]["LSB_JOBEXIT_STAT"] == "9"  # raw wait(2) status


def test_the_run_limit_sends_usr2_and_later_kills(cluster: Recorder) -> None:
    """D/T."""
    job = traps(cluster, "trap 'echo usr2' USR2; trap 'echo int; exit 3' INT; while :; do sleep 0.05; done", "-W", "5")
    assert cluster.ended(job)["exit_code"] == "3"
    assert [word for word in cluster.output(job).split() if word in ("usr2", "int")] == ["usr2", "int"]


def test_bstop_is_sigstop_or_what_job_controls_say(cluster: Recorder) -> None:
    """D/T: SIGSTOP for batch; SUSPEND[SIGTSTP] is catchable, a custom TERMINATE gets no SIGKILL (T)."""
    loop = b"trap 'echo tstp' TSTP\necho up\nwhile [ ! -e go ]; do sleep 0.05; done\n"
    plain, caught = cluster.bsub(stdin=loop), cluster.bsub("-q", "controls", stdin=loop)
    until(lambda: "up" in cluster.output(plain) and "up" in cluster.output(caught), "jobs")
    cluster.run_as(USER, ["bstop", plain, caught])
    until(lambda: "tstp" in cluster.output(caught), "SIGTSTP")
    (cluster.work / "go").touch()
    time.sleep(0.3)
    assert cluster.show(plain)["stat"] == "USUSP" and cluster.output(plain) == "up\n"
    cluster.run_as(USER, ["bresume", plain])
    assert cluster.ended(plain)["stat"] == cluster.ended(caught)["stat"] == "DONE"
    cluster.folder.chmod(0o777)
    custom = cluster.bsub("-q", "controls", "sleep 2")
    until(lambda: cluster.show(custom)["stat"] == "RUN", "job")
    cluster.run_as(USER, ["bkill", custom])
    until(lambda: list(cluster.folder.glob("terminated-*")), "TERMINATE")
    assert cluster.ended(custom)["stat"] == "DONE"


def test_requeue_values_run_the_job_again_without_limit(cluster: Recorder) -> None:
    """D/T; POST_EXEC runs with LSB_JOBPEND of one blank (T)."""
    job = cluster.bsub("-q", "hooked", stdin=b"echo run >> runs; [ $(wc -l < runs) -gt 3 ] || exit 77\n")
    assert cluster.ended(job)["stat"] == "DONE"
    assert (cluster.work / "runs").read_text() == "run\n" * 4
    until(lambda: len(cluster.calls("queue-post")) == 4, "POST_EXEC")
    assert sorted(call["environ"].get("LSB_JOBPEND", "") for call in cluster.calls("queue-post")) == ["", " ", " ", " "]


def test_sbatchd_away_loses_the_exit_code_and_ends_twice(cluster: Recorder) -> None:
    """T: status 65280 for a job that succeeded meanwhile; eexec END twice, POST once."""
    job = cluster.bsub("-q", "hooked", "sleep 0.6; echo done")
    until(lambda: "queue-pre" in cluster.names() and cluster.show(job)["stat"] == "RUN", "job")
    cluster.kill_daemon("sbatchd")
    until(lambda: "done" in cluster.output(job), "end")
    cluster.start_daemon("sbatchd")
    assert (cluster.ended(job)["stat"], cluster.show(job)["exit_code"]) == ("EXIT", "255")
    until(lambda: "queue-post" in cluster.names(), "POST_EXEC")
    assert cluster.names()[-3:] == ["END", "END", "queue-post"]
    assert cluster.calls("queue-post")[0]["environ"]["LSB_JOBEXIT_STAT"] == "65280"


def test_a_job_whose_res_was_killed_runs_on(cluster: Recorder) -> None:
    """T: RUN while its process group lives; and a child with its own session survives bkill."""
    job = cluster.bsub("echo $LS_JOBPID; setsid sleep 2 & sleep 60")
    pid = int(until(lambda: cluster.output(job), "job"))
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert cluster.show(job)["stat"] == "RUN"
    cluster.run_as(USER, ["bkill", job])
    assert cluster.ended(job)["stat"] == "EXIT"


def test_root_may_not_submit_and_bjobs_tells_in_json(cluster: Recorder) -> None:
    """T: permission denied; ``bjobs -json -o`` gives user, state and host at once."""
    assert cluster.run(["bsub", "true"], check=False).exit_code == 255
    job = cluster.bsub("-n", "2", "-J", "x[3]", "sleep 3")
    until(lambda: cluster.show(f"{job}[3]")["stat"] == "RUN", "job")
    assert cluster.show(job)["exec_host"] == f"2*{os.uname().nodename}"
    assert cluster.run(["bjobs", "-o", "nonsense", job], check=False).exit_code == 255
    listed = cluster.run(["bjobs", "-u", "all", "-m", os.uname().nodename, "-noheader", "-o", "jobid jobindex"]).text
    assert listed == f"{job} 3\n"
    cluster.ended(f"{job}[3]")
    none = cluster.run(["bjobs", "-u", "all", "-noheader", "-o", "jobid"], check=False)
    assert none.stderr == b"No unfinished job found\n"
