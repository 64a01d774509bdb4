"""What cgroup v1 tracking does to the processes of a job: the facts that the VM's home was chosen by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wnodes_slurm import plugin
from wnodes_slurm.testing import USER, Cluster, until

from wnodes_core import command, processes

pytestmark = pytest.mark.slurm
ROOT = Path("/sys/fs/cgroup")
EATER = "import time; b = bytearray(60 << 20); b[::4096] = b'1' * len(b[::4096]); time.sleep(100)"


def _find(mark: str) -> processes.Process | None:
    return next((p for p in processes.table() if p.command and mark in p.command and processes.alive(p)), None)


def test_kill_of_the_launcher_ends_its_family(cgroup_cluster: Cluster) -> None:
    """The freezer cgroup holds daemons too: they die with the batch step, with no grace."""
    mark = f"family-{os.getpid()}"
    job = cgroup_cluster.submit(f"setsid bash -c 'sleep 100; :' {mark} & wait", "--vm-image=debian12")
    daemon = until(lambda: _find(mark), "daemon")
    assert isinstance(daemon, processes.Process)
    task = next(p for p in processes.ancestry(daemon.pid) if "slurm_script" in " ".join(p.command) and p is not daemon)
    processes.kill(task)
    until(lambda: not processes.alive(daemon), "end of the daemon", 5)
    assert cgroup_cluster.ended(job)["JobState"] == "FAILED"


def test_extern_home_is_limited_accounted_and_outlives_scancel(cgroup_cluster: Cluster) -> None:
    """A VM moved into the extern step's cgroups, freezer apart, keeps the user's TERM grace and the limits."""
    script = "trap 'sleep 1; echo cleaned; exit 0' TERM; while :; do sleep 0.1; done"
    job = cgroup_cluster.submit(script, "--vm-image=debian12", "--mem=200")
    until(lambda: f"{job}.batch" in _sstat(cgroup_cluster, job), "batch step")
    table = list(processes.table())
    owners = [owner for p in table if (owner := plugin.wnodes_lrms_owner([p]))]
    owner = next(o for o in owners if o.job_id == job and o.node in cgroup_cluster.lab.node_names)
    home = plugin.wnodes_lrms_homes(owner, table)
    assert home and home.command[0] == "sleep"
    argv = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--", "/usr/bin/python3", "-c"]
    gate_out, gate_in = os.pipe()
    vm = command.spawn([*argv, f"import sys; sys.stdin.read(1); {EATER}"], stdin=gate_out)
    try:
        folders = _move(vm.pid, home.pid)
        os.write(gate_in, b"1")
        until(lambda: _rss_mib(cgroup_cluster, job) > 50, "memory in sstat")
        cgroup_cluster.lab.run(["scancel", job])
        assert cgroup_cluster.ended(job)["JobState"] == "CANCELLED"
        assert "cleaned" in cgroup_cluster.output(job)
        assert vm.poll() is None, "it must have outlived KillWait: ending it is our own duty"
        memory = next(folder for folder in folders if "/memory/" in str(folder))
        assert str(vm.pid) in (memory / "cgroup.procs").read_text().split(), "limits must hold to the end"
    finally:
        vm.kill()
        vm.wait()
        os.close(gate_in)
        os.close(gate_out)
    for folder in folders:  # Slurm could not remove them while it lived, and does not try again
        while "job_" in str(folder):
            os.rmdir(folder)
            folder = folder.parent
    assert cgroup_cluster.nodes() == {"idle"}


def test_memory_limit_kills_the_process_not_the_step(cgroup_cluster: Cluster) -> None:
    eater = EATER.replace("60 <<", "300 <<")
    job = cgroup_cluster.submit(f'/usr/bin/python3 -c "{eater}"; echo code $?', "--mem=60")
    assert cgroup_cluster.ended(job)["JobState"] == "OUT_OF_MEMORY"
    assert "code 137" in cgroup_cluster.output(job)


def _sstat(cluster: Cluster, job: str) -> str:
    return cluster.lab.run(["sstat", "-n", "-a", "-P", "-j", job, "-o", "JobID,MaxRSS"], check=False)


def _rss_mib(cluster: Cluster, job: str) -> float:
    rows = dict(line.split("|") for line in _sstat(cluster, job).splitlines() if "|" in line)
    return float(rows.get(f"{job}.extern", "0K").rstrip("KM") or 0) / 1024


def _move(pid: int, home: int) -> list[Path]:
    folders = []
    for line in Path(f"/proc/{home}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if path.startswith("/slurm_") and controllers != "freezer":
            folder = ROOT / controllers / path[1:]
            (folder / "cgroup.procs").write_text(str(pid))
            folders.append(folder)
    assert len(folders) >= 3, "memory, cpuset, cpuacct"
    return folders
