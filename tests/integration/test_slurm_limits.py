"""Slurm's own means on a VM job: cancel, time, memory, accounting, suspend. Each reaches into the guest."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_site import IMAGES, SHARED, Site, until

from wnodes_core import processes
from wnodes_core.images.store import Store
from wnodes_core.model import Image, Process

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
both = pytest.mark.parametrize("site", ["linuxproc", "cgroup"], indirect=True)
one = pytest.mark.parametrize("site", ["cgroup"], indirect=True)
GRACE = "trap 'sleep 2; echo cleaned > cleaned-$SLURM_JOB_ID; exit 3' TERM; echo begun; while :; do sleep 0.1; done"
BURN = "echo begun; timeout 6 sh -c 'while :; do :; done'; echo burnt; sleep 1000"


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, minimal_image: Image) -> Iterator[Site]:
    cgroup = request.param == "cgroup"
    build = SHARED if cgroup else "never"  # so each way that Slurm tracks has another kind of start
    with Site(minimal_image, "l", build=build, cgroup=cgroup, gather="cgroup" if cgroup else "linux") as site:
        yield site


def _keeper(lease: dict) -> Process:
    keeper = processes.read(lease["keeper_pid"])
    assert keeper
    return keeper


def _qemu(lease: dict) -> Process | None:
    named = f"guest=wnodes-{lease['id']},"
    return next((p for p in processes.table() if any(word.startswith(named) for word in p.command)), None)


def _free(site: Site) -> None:
    site.assert_nothing_left()
    until(lambda: site.nodes() == {"idle"}, f"idle node: {site.nodes()}")


def _begun(site: Site, job: str, word: str = "begun") -> None:
    until(lambda: word in site.output(job).split(), f"{word!r} from job {job}: {site.output(job)}", 60)


def _comment(site: Site, job: str) -> str:
    return site.lab.run(["scontrol", "-o", "show", "job", job]).partition("AdminComment=")[2]


@both
def test_cancelled_script_has_its_grace_and_a_booting_vm_goes_at_once(site: Site) -> None:
    job = site.submit(GRACE)
    lease = site.wait_running(job)
    _begun(site, job)
    booting = site.submit("echo never", "--vm-start=cold")
    until(lambda: site.lease(booting).get("keeper_state") == "starting" and _qemu(site.lease(booting)), "boot")
    other = site.lease(booting)
    site.run_as(["scancel", job, booting])
    began = time.monotonic()
    until(lambda: _qemu(other) is None, "end of the booting VM", 5)
    assert site.ended(job)["JobState"] == "CANCELLED"
    assert (site.work / f"cleaned-{job}").read_text() == "cleaned\n"
    assert 1.8 < time.monotonic() - began < 12
    assert site.ended(booting)["JobState"] == "CANCELLED"
    assert "never" not in site.output(booting)
    assert _qemu(lease) is None
    _free(site)


@both
def test_script_that_ignores_term_is_killed_with_its_vm(site: Site) -> None:
    job = site.submit("trap '' TERM; echo begun; while :; do sleep 0.1; done")
    lease = site.wait_running(job)
    keeper = _keeper(lease)
    _begun(site, job)
    began = time.monotonic()
    site.run_as(["scancel", job])
    until(lambda: not processes.alive(keeper) and _qemu(lease) is None, "end of the VM", 15)
    assert time.monotonic() - began > site.lab.kill_wait_s - 1
    assert site.ended(job)["JobState"] == "CANCELLED"
    _free(site)


@one
def test_time_limit_gives_the_grace_and_ends_the_vm(site: Site) -> None:
    job = site.submit(GRACE, "--time=1")
    lease = site.wait_running(job)
    _begun(site, job)
    site.lab.run(["scontrol", "update", f"jobid={job}", "EndTime=now+1"])  # Slurm looks every 30 s
    assert site.ended(job)["JobState"] == "TIMEOUT"
    assert (site.work / f"cleaned-{job}").read_text() == "cleaned\n"
    assert "DUE TO TIME LIMIT" in site.output(job)
    assert _qemu(lease) is None
    _free(site)


@one
def test_guest_that_uses_all_its_memory_is_not_killed_by_slurm(site: Site) -> None:
    eater = "head -c 1G /dev/zero | tail | wc -c; echo ${PIPESTATUS[1]}; grep MemTotal /proc/meminfo; echo alive"
    job = site.submit(eater, "--mem=700", "--vm-start=cold")
    fields = site.ended(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), site.output(job)
    said = site.output(job)
    assert "137" in said.split(), "the guest's own kernel must have ended the greedy process"
    assert "alive" in said.split()
    guest_kib = int(re.search(r"MemTotal:\s+(\d+) kB", said)[1])
    assert 250 << 10 < guest_kib < 400 << 10
    assert "(1 cpus, 380 MiB, tcg)" in said
    _free(site)


@one
def test_job_too_small_for_a_vm_is_told_how_much_it_needs(site: Site) -> None:
    job = site.submit("echo bare", "--mem=200")
    fields = site.ended(job)
    assert fields["JobState"] == "CANCELLED", site.output(job)
    assert "memory 200 MiB leaves" in _comment(site, job)
    assert "at least 448 MiB" in _comment(site, job)
    assert site.output(job) == ""
    _free(site)


@both
def test_slurm_accounts_and_holds_the_vm_of_batch_and_of_srun_jobs(site: Site) -> None:
    # Booted: of a clone's memory only what it wrote is the job's own.
    batch = site.submit(BURN, "--vm-start=cold")
    argv = ["srun", "--vm-image=debian12", "--vm-start=cold", "-J", "stepjob", "sh", "-c", BURN]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(site.run_as, argv, check=False)
        srun = str(until(lambda: site.lab.run(["squeue", "-h", "-n", "stepjob", "-o", "%A"]).strip(), "srun's job"))
        leases = {"batch": site.wait_running(batch), "extern": site.wait_running(srun)}
        assert (leases["batch"]["home"], leases["extern"]["home"]) == ("step", "job")
        _check_held(site, leases["batch"], batch, "batch")
        _check_held(site, leases["extern"], srun, "extern")
        site.run_as(["scancel", batch, srun])
        site.ended(batch)
        site.ended(srun)
    _free(site)


def _check_held(site: Site, lease: dict, job: str, step: str) -> None:
    if site.lab.cgroup:
        _check_cgroups(lease, job, f"step_{step}")
    if step == "batch" or site.lab.cgroup:  # jobacct_gather/linux sees no process outside a step's family
        until(lambda: _accounted(site, f"{job}.{step}"), f"use of {job}.{step}: {_sstat(site, job)}", 30)


def _check_cgroups(lease: dict, job: str, step: str) -> None:
    qemu = _qemu(lease)
    assert qemu
    for process in (_keeper(lease), qemu):
        lines = [line.split(":", 2) for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()]
        where = {controllers: path for _, controllers, path in lines}
        for controller in ("memory", "cpuset", "cpuacct"):
            assert f"/job_{job}/{step}" in where[controller], where
        frozen_with = f"/job_{job}/{step}" if step == "step_batch" else f"/wnodes/{lease['id']}"
        assert frozen_with in where["freezer"], where


def _sstat(site: Site, job: str) -> str:
    return site.lab.run(["sstat", "-n", "-a", "-P", "-j", job, "-o", "JobID,MaxRSS,AveCPU"], check=False)


def _accounted(site: Site, step: str) -> bool:
    """Whether Slurm has seen at least 150 MiB and 5 s of CPU time in a step."""
    rows = {row.split("|")[0]: row.split("|")[1:] for row in _sstat(site, step.partition(".")[0]).splitlines()}
    memory, cpu = rows.get(step, ["0", "00:00:00"])
    units = {"K": 1 / 1024, "M": 1, "G": 1024}
    mib = float(memory.rstrip("KMG")) * units.get(memory[-1], 1 / 1048576)
    hours, minutes, seconds = cpu.rpartition("-")[2].split(":")
    return mib > 150 and int(hours) * 3600 + int(minutes) * 60 + float(seconds) >= 5


@both
def test_suspended_guest_stands_still_and_goes_on(site: Site) -> None:
    job = site.submit("n=0; while [ ! -e stop ]; do echo $((n += 1)) > n; sleep 0.1; done; rm stop; echo end; exit 4")
    site.wait_running(job)
    until((site.work / "n").exists, "counter")
    site.lab.run(["scontrol", "suspend", job])
    seen = _stands_still(site.work / "n")
    assert site.show(job)["JobState"] == "SUSPENDED"
    site.lab.run(["scontrol", "resume", job])
    until(lambda: (site.work / "n").read_text() not in ("", seen), "counting again")
    (site.work / "stop").touch()
    assert site.ended(job)["ExitCode"] == "4:0"
    assert site.output(job).splitlines()[-1] == "end"
    _free(site)


def _stands_still(path: Path) -> str:
    """What a counter file holds once it has not changed for 2 s (twenty counts)."""
    seen, since = path.read_text(), time.monotonic()

    def quiet() -> bool:
        nonlocal seen, since
        if (now := path.read_text()) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 2

    until(quiet, "standstill", 10)
    return seen


@one
def test_two_jobs_on_the_node_have_two_vms(site: Site) -> None:
    wait = "touch here-$SLURM_JOB_ID; until [ -e here-{} ]; do sleep 0.1; done"
    script = f"hostname; cat /proc/sys/kernel/random/boot_id; {wait}"
    first = site.submit(script.format("two"))
    second = site.submit(script.format(first))
    until((site.work / f"here-{second}").exists, "second VM beside the first", 60)
    (site.work / "here-two").touch()
    said = []
    for job in (first, second):
        assert site.ended(job)["JobState"] == "COMPLETED"
        said += [line for line in site.output(job).splitlines() if not line.startswith("wnodes:")]
    assert said[0] == f"wn-{first}-l0" and said[2] == f"wn-{second}-l0"
    assert said[1] != said[3]
    (site.work / "here-two").unlink()
    _free(site)


@one
def test_image_that_cannot_be_fetched_is_a_message_not_a_bare_run(site: Site) -> None:
    entry = {"name": "lost", "tag": "latest", "format": "qcow2", "arch": "x86_64"}
    entry |= {"sha256": "ab" * 32, "sources": [f"{site.folder}/no-such-file"]}
    catalogue = Store(IMAGES).layout.catalogue / "lost.json"
    catalogue.write_text(json.dumps({"images": [entry]}))
    try:
        job, unknown = site.submit("echo bare", "--no-requeue", image="lost"), site.submit("echo bare", image="nowhere")
        again = site.submit("echo bare", image="lost")
        assert site.ended(job)["ExitCode"] == "125:0"
        # What is no fault of the job sends it back to its queue, once; Slurm starts it anew after minutes.
        until(lambda: site.show(again)["Restarts"] == "1", f"requeue of job {again}: {site.log()[-1500:]}")
        site.lab.run(["scancel", again])
        assert site.ended(unknown)["JobState"] == "CANCELLED"
    finally:
        catalogue.unlink()
    assert "bare" not in site.output(job).split()
    assert "no-such-file" in site.output(job)
    assert site.output(unknown) == ""
    assert "image 'nowhere'" in _comment(site, unknown)
    _free(site)
