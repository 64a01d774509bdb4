"""kill -9 of every part at its phases: the right verdict, nothing left, nothing run twice at a time or on the host."""

import os
import signal

import pytest
from wnodes_htcondor.testing import SHARED, Site, until

from wnodes_core import processes

pytestmark = [pytest.mark.condor, pytest.mark.guest]
COUNT = "echo $(uname -r) >> {work}/{name}; sleep {seconds}; exit 4"

# So long HTCondor waits for an execution point that does not answer before it runs the job elsewhere.
LEASE = "job_lease_duration = 20"


@pytest.fixture(scope="module")
def site(minimal_image):
    with Site(minimal_image, build=SHARED, cpus=4, kill_wait_s=5) as made:
        yield made


@pytest.fixture(autouse=True)
def queue_is_empty(site):
    yield
    site.remove_all()


def job(site, name, seconds=60, start="auto"):
    """A job that notes each of its runs, and on which kernel."""
    vm = f'vm = "mount={site.work},start={start}"'
    return site.submit(COUNT.format(work=site.work, name=name, seconds=seconds), vm, LEASE)


def runs(site, name):
    """The kernels of the job's runs so far; none may be the host's."""
    path = site.work / name
    found = path.read_text().split() if path.exists() else []
    assert not [release for release in found if not release.endswith("-cloud-amd64")]
    return len(found)


def started(site, *names):
    for name in names:
        until(lambda name=name: runs(site, name), f"first run of {name}; {site.log()[-1000:]}", 120)


def part(site, cluster, kind):
    """One process of a job: ``qemu``, ``keeper``, ``launcher``, ``starter``."""
    lease = site.lease(cluster)
    if kind == "qemu":
        return next(p for p in site.ours() if "qemu-system" in p.exe and lease["id"] in " ".join(p.command))
    keeper = processes.read(lease["keeper_pid"])
    launcher = processes.read(keeper.parent)
    return {"keeper": keeper, "launcher": launcher, "starter": processes.read(launcher.parent)}[kind]


def kill(process):
    os.kill(process.pid, signal.SIGKILL)


def test_parts_of_a_running_job(site):
    names = ("qemu", "keeper", "launcher", "starter")
    jobs = {name: job(site, name) for name in names}
    started(site, *names)
    parts = {name: part(site, jobs[name], name) for name in names}
    for process in parts.values():
        kill(process)
    # The VM is lost: the job's code had begun, so it is held and not run again.
    for name, text in (("qemu", "the VM ended while the job ran in it"), ("keeper", "keeper")):
        fields = site.until_state(jobs[name], "HELD", timeout_s=60)
        assert text in fields["HoldReason"], fields["HoldReason"]
        assert fields["HoldReasonSubCode"] == 104 and runs(site, name) == 1
    assert site.ended(jobs["launcher"])["ExitBySignal"] and site.exit_code(jobs["launcher"]) == -9
    # A lost starter is HTCondor's own trouble: it runs the job anew, and never two VMs of it at a time.
    until(lambda: runs(site, "starter") == 2, f"second run: {site.show(jobs['starter'])}", 90)
    assert len(site.ours()) == len([p for p in site.ours() if site.lease(jobs["starter"])["id"] in " ".join(p.command)])
    # With the startd its master kills the starter, and all that was the job's.
    kill(site.lab.daemons("condor_startd")[0])
    until(lambda: not site.ours(), "end of the VM after its startd's", 60)
    site.remove_all()
    site.assert_nothing_left()


def test_vm_killed_while_it_boots_is_requeued_once_then_held(site):
    cluster = job(site, "boot", seconds=0, start="cold")
    for _ in range(2):
        until(lambda: [p for p in site.ours() if "qemu-system" in p.exe and site.lease(cluster)["id"] in " ".join(p.command)], "QEMU", 60)
        lease = site.lease(cluster)["id"]
        kill(part(site, cluster, "qemu"))
        until(lambda lease=lease: site.state(cluster) == "HELD" or site.lease(cluster)["id"] != lease, "an end of that run", 60)
    fields = site.until_state(cluster, "HELD", timeout_s=60)
    assert fields["NumShadowStarts"] == 2 and fields["HoldReasonSubCode"] == 104 and runs(site, "boot") == 0
    site.run_as(["condor_release", cluster])  # whoever looked into it lets it run: nothing of the past stops it
    site.ended(cluster)
    assert site.exit_code(cluster) == 4 and runs(site, "boot") == 1
    site.assert_nothing_left()


def test_schedd_and_wnodesd_killed_and_back(site):
    names = ("goes-on", "ends-meanwhile")
    jobs = [job(site, "goes-on", seconds=12), job(site, "ends-meanwhile", seconds=2)]
    started(site, *names)
    site.stop_wnodesd(signal.SIGKILL)
    kill(site.lab.daemons("condor_schedd")[0])
    until(lambda: site.show(jobs[0]), "schedd again", 60)
    site.ended(jobs[1])
    site.start_wnodesd()
    for each in jobs:
        site.ended(each)
        assert site.exit_code(each) == 4
    assert [runs(site, name) for name in names] == [1, 1]
    site.assert_nothing_left()
