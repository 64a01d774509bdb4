"""The spine: an unmodified batch script, sent by a real sbatch, runs in a real VM."""

import pytest
from slurm_site import Site

pytestmark = [pytest.mark.slurm, pytest.mark.guest]


@pytest.mark.parametrize("cgroup", [False, True], ids=["linuxproc", "cgroup"])
def test_an_unmodified_script_runs_in_a_vm_and_leaves_nothing(minimal_image, cgroup):
    with Site(minimal_image, "w", cgroup=cgroup) as site:
        job = site.submit("uname -r; id -un; pwd; echo from-$(hostname) > made; exit 7")
        bare = site.submit("uname -r", image="")
        fields = site.ended(job)
        release, user, folder = [line for line in site.output(job).splitlines() if not line.startswith("wnodes:")]
        assert release.endswith("-cloud-amd64") and (user, folder) == (site.user, str(site.work))
        assert (site.work / "made").read_text() == f"from-wn-{job}-w0\n"
        assert (site.work / "made").owner() == site.user
        assert fields["ExitCode"] == "7:0"
        site.ended(bare)
        assert not site.output(bare).strip().endswith("-cloud-amd64")
        trace = site.lease(job)["trace"]
        names = [name for name, _, _ in trace]
        assert names[:6] == ["admit", "image", "launcher", "lease", "keeper", "overlay"]
        assert {"boot", "agent", "first instruction"} < set(names)  # "run" may come after the lease has ended
        begins = {name: begin for name, begin, _ in trace}
        assert begins["admit"] < 0 == begins["launcher"] < begins["lease"] < begins["keeper"] < begins["overlay"], trace
        site.assert_nothing_left()
