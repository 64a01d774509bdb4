"""A real Slurm, our SPANK plug-in and hooks, a recorder in the launcher's place: who lands where, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from wnodes_slurm import plugin
from wnodes_slurm.lab import Lab
from wnodes_slurm.testing import USER, Cluster, until

from wnodes_core import command, processes
from wnodes_core.api import Job

pytestmark = pytest.mark.slurm


def test_batch_script_with_option_lands_in_the_launcher(cluster: Cluster) -> None:
    job = cluster.submit("echo hello; exit 7", "--vm-image=debian12")
    assert cluster.ended(job)["ExitCode"] == "7:0"
    assert cluster.output(job) == "hello\n"
    assert cluster.launched(job) == ["slurm_script"]


def test_directive_in_the_script_is_enough(cluster: Cluster) -> None:
    job = cluster.submit("#SBATCH --vm=image=debian12,cpus=1\ntrue")
    assert cluster.ended(job)["JobState"] == "COMPLETED"
    assert cluster.launched(job) == ["slurm_script"]


def test_the_start_alone_asks_for_a_vm_too(cluster: Cluster) -> None:
    job = cluster.submit("#SBATCH --vm-start=warm\ntrue")
    assert cluster.ended(job)["JobState"] == "COMPLETED"
    assert cluster.launched(job) == ["slurm_script"]


def test_ordinary_job_is_left_alone(cluster: Cluster) -> None:
    job = cluster.submit("echo bare; srun echo step")
    assert cluster.ended(job)["JobState"] == "COMPLETED"
    assert cluster.output(job) == "bare\nstep\n"
    assert cluster.launched(job) == []
    assert not list(cluster.folder.glob(f"prepare.{job}.*")), "an ordinary job must not start Python"


WAYS_OUT = {
    "plain": "srun echo plain",
    "nested": "srun --overlap bash -c 'srun --overlap echo nested'",
    "empty": "env -i PATH=$PATH SLURM_CONF=$SLURM_CONF SLURM_JOB_ID=$SLURM_JOB_ID srun --overlap echo empty",
    "jobid": "env -i PATH=$PATH SLURM_CONF=$SLURM_CONF srun --jobid=$SLURM_JOB_ID --overlap echo jobid",
    "noexport": "srun --export=NONE echo noexport",
    "overlap": "srun --overlap echo overlap",
    "other": "srun --overlap --vm-image=other echo other",
    "nodename": "SLURMD_NODENAME=zz srun --overlap --export=ALL,SLURMD_NODENAME=zz echo nodename",
    "unset": "unset ${!SLURM_SPANK*} ${!_SLURM_SPANK*} ${!SPANK*}; srun --overlap echo unset",
    "prolog": "srun --overlap --task-prolog=/bin/true echo prolog",
    "argv0": "WNODES_ARGV0=/bin/false srun --overlap echo argv0",
}


def test_no_step_of_a_vm_job_gets_out(cluster: Cluster) -> None:
    """Every way that a user has tried to leave the VM ends in the launcher."""
    job = cluster.submit("\n".join(f"( {line} )" for line in WAYS_OUT.values()), "--vm-image=debian12", "-n1", "-c1")
    assert cluster.ended(job, 60)["JobState"] == "COMPLETED"
    launched = cluster.launched(job)
    for way in WAYS_OUT:
        assert way in cluster.output(job).split(), (way, cluster.output(job))
        assert f"echo {way}" in launched


def test_srun_alone_and_salloc_shell(cluster: Cluster) -> None:
    result = cluster.lab.run_as(USER, ["srun", "--vm-image=debian12", "sh", "-c", "echo $SLURM_JOB_ID"])
    assert cluster.launched(result.text.strip()) == ["sh -c echo $SLURM_JOB_ID"]
    shell = ["script", "-qec", "salloc --vm-image=debian12", "/dev/null"]
    entry = {**cluster.lab.environ, "SHELL": "/bin/sh", "PS1": "$ ", "TERM": "dumb"}
    become = cluster.lab.identity(USER)
    out = command.run(shell, stdin=b"echo job=$SLURM_JOB_ID.\nexit\n", environ=entry, cwd="/tmp", become=become).text
    match = re.search(r"job=(\d+)\.", out)
    assert match and cluster.launched(match[1]) == ["sh"], out


def test_array_tasks_and_two_nodes(cluster: Cluster) -> None:
    array = cluster.submit("echo task", "--vm-image=debian12", "--array=1-2")
    until(lambda: cluster.output(array, "1") and cluster.output(array, "2"), "output of both tasks")
    until(lambda: not cluster.queued(array), "end of the array")
    ids = {line.split("|")[0] for line in cluster.record.read_text().splitlines()}
    wide = cluster.submit("srun -N2 -n2 echo wide", "--vm-image=debian12", "-N2", "-n2")
    assert cluster.ended(wide)["JobState"] == "COMPLETED"
    assert array in ids and len(ids & {array, str(int(array) - 1), str(int(array) + 1)}) >= 2
    assert cluster.launched(wide).count("echo wide") == 2
    assert len(list(cluster.folder.glob(f"prepare.{wide}.*"))) == 2


def _completing(cluster: Cluster) -> bool:
    return "completing" in cluster.nodes()


@pytest.mark.parametrize("how", ["sbatch", "srun"])
def test_missing_marker_fails_closed_and_drains_nothing(cluster: Cluster, how: str) -> None:
    if how == "srun":
        done = cluster.lab.run_as(USER, ["srun", "--vm-image=nomarker", "echo", "bare"], check=False)
        assert done.exit_code != 0 and b"bare\n" not in done.stdout
        assert b"asked for a VM, but this node prepared none" in done.stderr
    else:
        job = cluster.submit("echo bare", "--vm-image=nomarker")
        assert cluster.ended(job)["JobState"] == "FAILED"
        assert "asked for a VM, but this node prepared none" in cluster.output(job)
        assert "bare\n" not in cluster.output(job)
    until(lambda: cluster.nodes() == {"idle"}, "idle nodes")


@pytest.mark.parametrize(
    ("image", "comment"),
    [("hold", "no such image hint: one of 'debian12', \"el9\""), ("bug", None), ("requeue", "no room for the VM now")],
)
@pytest.mark.parametrize("how", ["sbatch", "srun"])
def test_prolog_refuses_without_draining(cluster: Cluster, image: str, comment: str | None, how: str) -> None:
    if how == "srun":
        command_line = ["srun", f"--vm-image={image}", "-J", f"s-{image}", "echo", "bare"]
        done = cluster.lab.run_as(USER, command_line, check=False)
        assert done.exit_code != 0 and b"bare\n" not in done.stdout, done
        job = cluster.lab.run(["squeue", "-h", "-t", "all", "-n", f"s-{image}", "-o", "%A"]).split()[-1]
        if comment:
            assert comment.encode() in done.stderr  # scontrol notify
    else:
        job = cluster.submit("echo bare", f"--vm-image={image}")
    if (how, image) == ("sbatch", "requeue"):  # a second chance, two minutes later by Slurm's own rule
        until(lambda: cluster.show(job)["Restarts"] == "1", "requeue")
        until(lambda: cluster.show(job)["JobState"] == "PENDING" and not _completing(cluster), "end of the first run")
        # Not at once: slurmd has revoked the credential of this second.
        cluster.lab.run(["scontrol", "update", f"JobId={job}", "StartTime=now+4"])
    assert cluster.ended(job)["JobState"] == "CANCELLED"
    assert "bare\n" not in cluster.output(job)
    if comment:
        text = cluster.lab.run(["scontrol", "-o", "show", "job", job])
        assert comment in text.partition("AdminComment=")[2].replace("\\", "")
    until(lambda: cluster.nodes() == {"idle"}, "idle nodes")


def test_sick_host_is_drained_with_a_reason(cluster: Cluster) -> None:
    job = cluster.submit("echo bare", "--vm-image=drain", "--no-requeue")
    until(lambda: cluster.nodes() - {"idle"} and "drained" in cluster.nodes(), "drained node")
    reason, node = cluster.lab.run(["sinfo", "-h", "-R", "-o", "%E|%N"]).strip().split("|")
    cluster.lab.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
    cluster.lab.run(["scancel", job], check=False)
    assert "no space left" in reason
    until(lambda: cluster.nodes() == {"idle"}, "idle nodes")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--vm-image=", "want NAME"),
        ("--vm-image=../etc", "want NAME"),
        ("--vm-image=a b", "want NAME"),
        ("--vm-image=" + "a" * 300, "want NAME"),
        ("--vm-image=a;id", "want NAME"),
        ("--vm-start=hot", "want auto, warm or cold"),
        ("--vm-start=", "want auto, warm or cold"),
        ("--vm=debian12", "want KEY=VALUE"),
        ("--vm=image=a\nb", "control character"),
        ("--vm=image=" + "a" * 9000, "want KEY=VALUE"),
    ],
)
@pytest.mark.parametrize("program", ["sbatch", "srun", "salloc"])
def test_bad_option_is_refused_at_submission(cluster: Cluster, program: str, option: str, message: str) -> None:
    what = "--wrap=true" if program == "sbatch" else "/bin/true"
    done = cluster.lab.run_as(USER, [program, option, what], check=False)
    assert done.exit_code != 0
    assert message in done.stderr.decode()


def test_owner_homes_and_facts_of_a_running_job(cluster: Cluster) -> None:
    hostile = "x JOB_GRES=(null) Nodes=zz CPU_IDs=0-63 Mem=999999 GRES= MinCPUsNode=1"
    job = cluster.submit("srun -N2 -n2 sleep 100", "--vm-image=debian12", "-N2", "-n2", "--mem=100")
    sleeps = until(lambda: _tasks("sleep", "100", job), "two running tasks")
    owners = [plugin.wnodes_lrms_owner(list(processes.ancestry(p.pid))) for p in sleeps]
    assert {(o.job_id, o.step, o.job_long, o.node) for o in owners} == {
        (job, "0", False, node) for node in cluster.lab.node_names
    }
    table = list(processes.table())
    homes = {plugin.wnodes_lrms_homes(owner, table) for owner in owners}
    assert len(homes) == 2 and all(home and home.command[0] == "sleep" for home in homes)
    fact = Job("slurm", job, cluster.lab.node_names[1], 0, 0, "")
    text = cluster.lab.run(plugin.wnodes_lrms_facts_query(fact))
    fact = plugin.wnodes_lrms_facts_parse(fact, text)
    assert (fact.cpus, fact.memory_mib, fact.queue) == (1, 100, "main")
    live = cluster.lab.run(plugin.wnodes_lrms_live_query(fact.node))
    assert plugin.wnodes_lrms_live_parse(live) == {job}
    cluster.lab.run(["scontrol", "update", f"JobId={job}", f"JobName={hostile}"])
    with pytest.raises(Exception, match="want other words"):
        plugin.wnodes_lrms_facts_parse(fact, cluster.lab.run(plugin.wnodes_lrms_facts_query(fact)))
    cluster.lab.run(["scancel", job])
    cluster.ended(job)


def _tasks(name: str, argument: str, job: str) -> list[processes.Process] | None:
    found = [p for p in processes.table() if p.command[:2] == (name, argument) and _job(p.pid) == job]
    return found if len(found) == 2 else None


def _job(pid: int) -> str:
    owner = plugin.wnodes_lrms_owner(list(processes.ancestry(pid)))
    return owner.job_id if owner and owner.node.startswith(f"t{os.getpid()}x") else ""  # the numbers are every Slurm's


def test_nobody_forges_a_slurmstepd(cluster: Cluster) -> None:
    """A user may give a program of his own that name and that title; he is still not root."""
    folder = cluster.folder / "forged"
    folder.mkdir()
    program = folder / "slurmstepd"
    shutil.copy(os.path.realpath("/usr/bin/python3"), program)
    argv = ["setpriv", f"--reuid={USER}", "--clear-groups", f"--regid={USER}", "--", "bash", "-c"]
    argv += [f"exec -a 'slurmstepd: [1.batch]' {program} -c 'import time; time.sleep(60)'"]
    child = command.spawn(argv)
    try:
        read = processes.read
        until(lambda: (p := read(child.pid)) and p.command[0] == "slurmstepd: [1.batch]", "forged title")
        process = read(child.pid)
        assert process and os.path.basename(process.exe) == "slurmstepd"
        assert plugin.wnodes_lrms_owner([process]) is None
    finally:
        child.kill()
        child.wait()


def test_advertise_keeps_the_sites_features(cluster: Cluster) -> None:
    node = cluster.lab.node_names[0]
    cluster.lab.run(["scontrol", "update", f"NodeName={node}", "AvailableFeatures=ib,vm_old", "ActiveFeatures=ib"])

    def publish(images: list[str], *templates: str) -> str:
        shown = cluster.lab.run(plugin.wnodes_lrms_advertise_query(node))
        for argv in plugin.wnodes_lrms_advertise(node, {"images": images, "templates": templates, "published": shown}):
            cluster.lab.run(argv)
        return cluster.lab.run(["sinfo", "-h", "-n", node, "-o", "%f %b"]).strip()

    assert publish(["el9", "debian12"]) == "ib,vm,vm_debian12,vm_el9 ib,vm,vm_debian12,vm_el9"
    job = cluster.submit("echo constrained", "--constraint=ib&vm_debian12")
    cluster.ended(job)
    assert cluster.launched(job) == ["slurm_script"]
    assert publish(["el9"], "el9") == "ib,vm,vm_el9,warm_el9 ib,vm,vm_el9,warm_el9"
    assert publish([]) == "ib,vm ib,vm"


def test_prolog_environment_names_the_job(cluster: Cluster) -> None:
    job = cluster.submit("true", "--vm-image=debian12", "--vm-start=cold")
    cluster.ended(job)
    seen = json.loads(next(cluster.folder.glob(f"prepare.{job}.*")).read_text())
    assert (seen["SPANK_VM_IMAGE"], seen["SPANK_VM_START"]) == ("debian12", "cold") and seen["SLURM_JOB_USER"] == USER
    assert next(cluster.folder.glob(f"finish.{job}.*")), "the Epilog must have called finish"


def test_down_leaves_nothing(public_folder: Path) -> None:
    folder = public_folder
    lab = Lab(folder, prefix=f"d{os.getpid()}x")
    started = time.monotonic()
    with lab:
        assert time.monotonic() - started < 5
        lab.run(["sbatch", "--output=/dev/null", "--wrap", "trap '' TERM; sleep 100"])
        until(lab.step_daemons, "slurmstepd")
        pids = [p.pid for p in processes.table() if str(folder) in "".join(p.command)]
        assert pids
    assert lab.step_daemons() == []
    assert not [p for p in processes.table() if str(folder) in "".join(p.command) and processes.alive(p)]
    assert not list(folder.rglob("*.socket"))
