"""What goes wrong under LSF: bad requests, daemons killed, hooks twice, late or never, forgers. Real guests, real wnodesd."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from wnodes_lsf.testing import SHARED, Site, until

from wnodes_core.model import Image

pytestmark = [pytest.mark.lsf, pytest.mark.guest]
ID = "/proc/sys/kernel/random/boot_id"
HOST = Path(ID).read_text().strip()


@pytest.fixture(scope="module")
def site(minimal_image: Image) -> Iterator[Site]:
    with Site(minimal_image, build=SHARED, LSB_SIM_PRE_RETRY=0.5) as site:
        yield site


@pytest.fixture(autouse=True)
def clean_again(site: Site) -> Iterator[None]:
    yield
    site.assert_nothing_left()


def said(site: Site, job: str) -> list[str]:
    return [line for line in site.output(job).splitlines() if not line.startswith("wnodes: booting")]


REFUSED = {
    "wnodes(imge=debian12)": "did you mean image=?",
    "wnodes(image=debian12": "want wnodes(image=NAME,...) with one pair of brackets",
    "wnodes(image=a) wnodes(image=b)": "wnodes stands there 2 times",
    "wnodes(image=$(id))": "want wnodes(image=NAME,...)",
    "wnodes(mount=/a`id`)": "LSF can carry only letters",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_bad_request_is_refused_while_the_user_watches(site, words):
    done = site.run_as(["bsub", "-a", words, "true"], check=False)
    assert done.exit_code == 255 and "Job not submitted" in done.stderr.decode()
    assert REFUSED[words] in done.stderr.decode()


@pytest.mark.parametrize(
    ("options", "wish"),
    [
        (["-L", "/bin/bash"], "bsub -L: a VM cannot follow it"),
        (["-k", "/tmp/c"], "bsub -k: a VM cannot follow it"),
        (["-ar"], "bsub -ar: a VM cannot follow it"),
        (["-q", "normal"], "queue 'normal' gives no VMs: want -q vm"),
    ],
)
def test_what_a_vm_cannot_follow_is_refused(site, options, wish):
    done = site.run_as(["bsub", "-a", "wnodes(debian12)", *options, "true"], check=False)
    assert done.exit_code == 255 and wish in done.stderr.decode()


def test_bmod_checks_again_and_a_switched_job_never_runs_bare(site):
    job = site.bsub(["-H", f"cat {ID}"])
    done = site.run_as(["bmod", "-a", "wnodes(imge=x)", job], check=False)
    assert done.exit_code == 255 and "did you mean image=?" in done.stderr.decode()
    assert site.run_as(["bmod", "-a", "wnodes(image=debian12)", job]).exit_code == 0
    site.run_as(["bswitch", "normal", job])
    site.run_as(["bresume", job])
    assert site.ended(job)["exit_code"] == "137"  # eexec ended it before its first instruction
    assert site.output(job) == ""


def test_an_image_that_is_not_there_ends_the_job_at_once(site):
    job = site.submit("echo never", image="nosuch")
    assert site.ended(job)["exit_code"] == "99"  # PRE_EXEC: never again
    assert site.output(job) == ""


def test_without_wnodesd_the_job_waits_and_runs_when_it_is_back(site):
    site.stop_wnodesd(signal.SIGKILL)
    job = site.submit(f"cat {ID}")
    until(lambda: site.show(job)["stat"] == "RUN", lambda: site.show(job), 10)
    until(lambda: site.show(job)["stat"] == "PEND", lambda: site.show(job), 10)
    site.start_wnodesd()
    assert site.ended(job)["stat"] == "DONE" and said(site, job)[0] != HOST


def test_hooks_that_never_run_cost_time_and_nothing_else(minimal_image):
    with Site(minimal_image, build=SHARED, queue={"PRE_EXEC": "", "POST_EXEC": ""}) as bare:
        (bare.lab.serverdir / "eexec").unlink()
        job = bare.submit(f"cat {ID}; exit 3")
        silent = bare.submit("echo never", image="nosuch")
        assert bare.ended(job)["exit_code"] == "3" and said(bare, job)[0] != HOST, bare.about(job)
        assert bare.ended(silent)["exit_code"] == "125"
        assert "image 'nosuch'" in bare.output(silent) and "never" not in bare.output(silent)
        lost = bare.submit("touch begun; sleep 100")
        until(lambda: (bare.work / "begun").exists(), lambda: bare.about(lost), 90)
        bare.stop_wnodesd(signal.SIGKILL)
        asked = bare.submit("echo never")
        assert bare.ended(asked)["exit_code"] == "125" and "systemctl start wnodesd" in bare.output(asked)
        bare.start_wnodesd()
        bare.wait_running(lost)
        assert bare.show(lost)["stat"] == "RUN"
        bare.run_as(["bkill", lost])
        bare.ended(lost)
        bare.assert_nothing_left()


def test_hooks_twice_late_and_out_of_order_change_nothing(site):
    """The user may call all of them at any time from below sbatchd, here from the job's own -E and from outside."""
    hook = shlex.quote(f"{site.lab.serverdir}/eexec")
    twice = f"for n in 1 2 3; do LS_EXEC_T=START {hook}; LS_EXEC_T=END {hook}; done; LS_EXEC_T=START {hook}; exit 0"
    job = site.submit(f"cat {ID}; touch up; while [ ! -e go2 ]; do sleep 0.2; done; exit 3", "-E", twice, "-Ep", twice)
    until(lambda: (site.work / "up").exists(), lambda: site.about(job), 90)
    outside = {"LS_EXEC_T": "END", "LSB_JOBID": job, "LSB_JOBINDEX": "0", "WNODES_REQUEST": ""}
    assert site.run_as([str(site.lab.serverdir / "eexec")], environ=outside).exit_code == 0
    assert site.run_as([str(site.folder / "hooks/post_exec")], environ=outside, check=False).exit_code == 0
    forged = site.run_as([str(site.folder / "hooks/launch"), "id"], environ=outside, check=False)
    assert forged.exit_code == 125 and "does not descend from the batch system" in forged.stderr.decode()
    assert site.lease(job)["state"] == "running"
    (site.work / "go2").touch()
    assert site.ended(job)["exit_code"] == "3", site.about(job)
    assert said(site, job)[0] != HOST


PHASES = ("queued", "booting", "running")


@pytest.mark.parametrize("phase", PHASES)
def test_sbatchd_may_be_killed_and_started_again_at_any_time(site, phase):
    """The job goes on in its VM; LSF loses its exit code (65280) if it ends meanwhile, END comes twice."""
    mark, go = site.work / f"mark-{phase}", site.work / f"go-{phase}"
    if phase == "queued":
        site.lab.kill_daemon("sbatchd")
    image = "debian12,start=cold" if phase == "booting" else "debian12"
    job = site.submit(f"cat {ID}; touch {mark}; while [ ! -e {go} ]; do sleep 0.1; done; exit 4", image=image)
    if phase == "booting":
        until(lambda: site.lease(job).get("state") in ("starting", "running"), lambda: site.about(job), 60)
    elif phase == "running":
        until(mark.exists, lambda: site.about(job), 90)
    site.lab.kill_daemon("sbatchd")
    go.touch()
    if phase != "queued":
        until(lambda: site.lease(job)["state"] in ("over", "ended"), lambda: site.about(job), 90)
        assert mark.exists()
    site.lab.start_daemon("sbatchd")
    shown = site.ended(job)
    assert shown["exit_code"] == ("4" if phase == "queued" else "255"), site.about(job)
    assert said(site, job) == [said(site, job)[0]] and said(site, job)[0] != HOST


def test_a_node_that_lost_sbatchd_res_and_launcher_is_clean_by_itself(site):
    job = site.submit("touch lost; sleep 100")
    until(lambda: (site.work / "lost").exists(), lambda: site.about(job), 90)
    site.lab.kill_daemon("sbatchd")
    pid = json.loads((site.lab.share / "sbatchd.state").read_text())[job]["pid"]
    os.killpg(pid, signal.SIGKILL)
    until(lambda: not site.ours() and not list((site.folder / "state/leases").iterdir()), lambda: site.about(job), 30)
    assert site.lease(job)["state"] == "over"  # LSF still holds it for running: so does the marker
    site.lab.start_daemon("sbatchd")
    assert site.ended(job)["exit_code"] == "255"


def test_a_guest_that_does_not_come_up_is_tried_once_more_and_no_more(minimal_image):
    with Site(minimal_image, settings="vm: {boot_timeout_s: 1}") as slow:
        job = slow.submit("echo never")
        assert slow.ended(job)["exit_code"] == "125", slow.about(job)
        assert len(re.findall("booting", slow.output(job))) == 2, slow.output(job)
        assert "requeued for this once already" in slow.output(job) and "never" not in slow.output(job)
        slow.assert_nothing_left()


def test_lsf_knows_how_many_vms_the_node_takes(minimal_image):
    with Site(minimal_image, settings="", queue={}) as counted:
        path = counted.folder / "run" / "capacity"
        until(path.exists, "capacity")
        assert path.stat().st_mode & 0o777 == 0o644
        free = f"\nslots {len(os.sched_getaffinity(0))}\n"
        assert re.match(rf"wnodesd {counted.daemon.pid} \d+{free}", path.read_text())
        assert "\nimage debian12\n" in path.read_text()
        job = counted.submit("touch counting; sleep 100")
        until(lambda: "slots 1\n" in path.read_text(), lambda: path.read_text())
        counted.run_as(["bkill", job])
        counted.ended(job)
        until(lambda: free in path.read_text(), lambda: path.read_text())
