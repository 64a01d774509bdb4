"""Whatever is killed under a VM job: the VM goes in seconds or the job goes on, and nothing is left."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from slurm_site import SHARED, Site, until

from wnodes_core import processes
from wnodes_core.model import Image, Process

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
both = pytest.mark.parametrize("site", ["linuxproc", "cgroup"], indirect=True)
one = pytest.mark.parametrize("site", ["cgroup"], indirect=True)
ENDLESS = "echo begun; sleep 1000; echo never"
COUNT = (
    "n=0; while [ ! -e stop-$SLURM_JOB_ID ]; do echo $((n += 1)) > n-$SLURM_JOB_ID; sleep 0.2; done; echo end; exit 3"
)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, minimal_image: Image) -> Iterator[Site]:
    cgroup = request.param == "cgroup"
    build = SHARED if cgroup else "never"  # so each way that Slurm tracks has another kind of start
    with Site(minimal_image, "k", build=build, cgroup=cgroup) as site:
        yield site


def _launcher(site: Site, lease: dict) -> Process:
    keeper = processes.read(lease["keeper_pid"])
    mark = str(site.folder / "hooks" / "launch")
    return next(p for p in processes.table() if mark in p.command and p.pid == keeper.parent)


def _qemu(lease: dict) -> Process | None:
    named = f"guest=wnodes-{lease['id']},"
    return next((p for p in processes.table() if any(word.startswith(named) for word in p.command)), None)


def _stepd(lease: dict) -> Process:
    return next(p for p in processes.ancestry(lease["keeper_pid"]) if "slurmstepd" in p.exe)


def _victim(site: Site, lease: dict, who: str) -> Process:
    keeper = processes.read(lease["keeper_pid"])
    found = {"keeper": keeper, "launcher": _launcher(site, lease), "qemu": _qemu(lease), "slurmstepd": _stepd(lease)}
    return found[who]


def _all_gone(lease: dict, keeper: Process) -> bool:
    return _qemu(lease) is None and not processes.alive(keeper)


def _kill(site: Site, job: str, who: str) -> None:
    """Kill one process of a running VM job; its VM must be gone in seconds, whoever it was."""
    lease = site.wait_running(job)
    keeper = processes.read(lease["keeper_pid"])
    assert processes.kill(_victim(site, lease, who))
    until(lambda: _all_gone(lease, keeper), lambda: f"end of the VM after kill -9 of the {who}: {site.log()[-1500:]}", 8)


def _free(site: Site) -> None:
    site.assert_nothing_left()
    until(lambda: site.nodes() == {"idle"}, "idle node")


@both
def test_killed_launcher_and_killed_keeper_end_the_vm_in_seconds(site: Site) -> None:
    jobs = {who: site.submit(ENDLESS) for who in ("launcher", "keeper")}
    for who, job in jobs.items():
        _kill(site, job, who)
    assert site.ended(jobs["launcher"])["ExitCode"] == "0:9"
    fields = site.ended(jobs["keeper"])
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] == "125:0"
    assert "wnodes: error: keeper" in site.output(jobs["keeper"])
    for job in jobs.values():
        assert "never" not in site.output(job)
    _free(site)


@both
def test_killed_qemu_and_killed_slurmstepd_end_the_vm_in_seconds(site: Site) -> None:
    jobs = {who: site.submit(ENDLESS) for who in ("qemu", "slurmstepd")}
    for who, job in jobs.items():
        _kill(site, job, who)
    fields = site.ended(jobs["qemu"])
    assert fields["ExitCode"] == "125:0"
    assert "wnodes: error: the VM ended while the job ran in it" in site.output(jobs["qemu"])
    # Slurm finds a dead slurmstepd only after minutes; an admin's scancel ends the job at once.
    site.lab.run(["scancel", jobs["slurmstepd"]])
    site.ended(jobs["slurmstepd"])
    for job in jobs.values():
        assert "never" not in site.output(job)
    _free(site)


@both
def test_job_goes_on_when_wnodesd_and_slurmd_are_killed_and_started_again(site: Site) -> None:
    job = site.submit(COUNT)
    before = site.wait_running(job)
    site.stop_wnodesd(signal.SIGKILL)
    site.start_wnodesd()
    after = site.wait_running(job)
    same = ("id", "keeper_pid", "state")
    assert [after[name] for name in same] == [before[name] for name in same]
    node = site.lab.node_names[0]
    site.lab.kill_node(node)
    counted = (site.work / f"n-{job}").read_text()
    until(lambda: (site.work / f"n-{job}").read_text() != counted, "counting without slurmd")
    site.lab.start_node(node)
    assert processes.alive(processes.read(before["keeper_pid"]))
    (site.work / f"stop-{job}").touch()
    fields = site.ended(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "3:0", "0")
    assert site.output(job).splitlines()[-1] == "end"
    _free(site)


@one
def test_job_ends_well_while_wnodesd_is_down_and_no_job_starts_bare(site: Site) -> None:
    job = site.submit(COUNT)
    lease = site.wait_running(job)
    keeper = processes.read(lease["keeper_pid"])
    site.stop_wnodesd()
    try:
        _check_refusals(site)
        assert processes.alive(keeper)
        (site.work / f"stop-{job}").touch()
        assert site.ended(job)["ExitCode"] == "3:0"
        until(lambda: _all_gone(lease, keeper), "end of the VM without wnodesd", 8)
    finally:
        site.start_wnodesd()
    _free(site)


def _check_refusals(site: Site) -> None:
    """With wnodesd down a job gets its second chance later, one that must not be requeued is cancelled."""
    again, once = site.submit("echo bare", "--requeue"), site.submit("echo bare", "--no-requeue")
    assert site.ended(once)["JobState"] == "CANCELLED"
    until(lambda: (site.show(again)["Restarts"], site.show(again)["JobState"]) == ("1", "PENDING"), "requeue")
    site.run_as(["scancel", again])
    for job in (again, once):
        assert site.output(job) == ""
        assert "wnodesd" in _comment(site, job)


def _comment(site: Site, job: str) -> str:
    return site.lab.run(["scontrol", "-o", "show", "job", job]).partition("AdminComment=")[2]


@one
def test_requeued_job_runs_again_in_a_fresh_vm(site: Site) -> None:
    script = "cat /proc/sys/kernel/random/boot_id; hostname; echo run-$SLURM_RESTART_COUNT\n"
    job = site.submit(f'{script}[ -n "$SLURM_RESTART_COUNT" ] || sleep 1000', "--open-mode=append", "--requeue")
    first = site.wait_running(job)
    until(lambda: "run-" in site.output(job), "first run")
    site.lab.run(["scontrol", "requeue", job])
    until(lambda: site.show(job)["Restarts"] == "1" and site.nodes() == {"idle"}, "end of the first run")
    site.assert_nothing_left()
    # Slurm holds a requeued job back for two minutes, and the credential of this second is revoked.
    site.lab.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"])
    assert site.ended(job)["JobState"] == "COMPLETED"
    said = [line for line in site.output(job).splitlines() if not line.startswith(("wnodes:", "slurmstepd"))]
    boots = [line for line in said if line.count("-") == 4]
    assert len(set(boots)) == 2, site.output(job)
    assert said.count(f"wn-{job}-k0") == 2
    assert said[-1] == "run-1"
    assert site.lease(job)["id"] != first["id"]
    _free(site)
