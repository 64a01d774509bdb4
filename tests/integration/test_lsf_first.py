"""The spine: an unmodified batch script, sent by bsub, runs in a real VM. But for LSF itself nothing is a fake."""

import pytest
from wnodes_lsf.testing import Site

pytestmark = [pytest.mark.lsf, pytest.mark.guest]


@pytest.mark.parametrize("release", ["T", "D"])
def test_an_unmodified_script_runs_in_a_vm_and_leaves_nothing(minimal_image, release):
    with Site(minimal_image, release=release) as site:
        job = site.submit("uname -r; id -un; pwd; echo from-$(hostname) > made; exit 7")
        bare = site.submit("uname -r", image="")
        shown = site.ended(job)
        release, user, folder = [line for line in site.output(job).splitlines() if not line.startswith("wnodes:")]
        assert release.endswith("-cloud-amd64") and (user, folder) == (site.user, str(site.work))
        assert (site.work / "made").read_text() == f"from-wn-{job}-{site.node}\n"
        assert (site.work / "made").owner() == site.user
        assert (shown["stat"], shown["exit_code"], shown["queue"]) == ("EXIT", "7", "vm")
        assert site.ended(bare)["queue"] == "normal"
        assert not site.output(bare).strip().endswith("-cloud-amd64")
        names = {name for name, *_ in site.lease(job)["trace"]}
        assert {"admit", "image", "lease", "overlay", "boot", "agent", "run"} <= names
        site.assert_nothing_left()
