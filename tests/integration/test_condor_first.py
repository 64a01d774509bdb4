"""The spine: an unmodified script, sent by a real condor_submit, runs in a real VM."""

import pytest
from wnodes_htcondor.testing import Site

pytestmark = [pytest.mark.condor, pytest.mark.guest]


@pytest.mark.parametrize("release", ["23", "25"])
def test_an_unmodified_script_runs_in_a_vm_and_leaves_nothing(minimal_image, release):
    with Site(minimal_image, release=release) as site:
        (site.work / "input").write_text("from the access point\n")
        job = site.submit("uname -r; id -un; pwd; cat input; echo from-$(hostname) > made; exit 7", "transfer_input_files = input")
        bare = site.submit("uname -r", image="")
        refused = site.submit("true", 'vm = "mount=/etc:/etc"')
        fields = site.ended(job)
        release_, user, folder, text = site.output(job).splitlines()
        assert release_.endswith("-cloud-amd64") and user == site.user and folder.startswith(str(site.lab.folder / "execute"))
        assert text == "from the access point"
        assert (site.work / "made").read_text().startswith(f"from-wn-{job}-0-slot1")
        assert (site.work / "made").owner() == site.user
        assert site.exit_code(job) == 7 and not fields["ExitBySignal"]
        site.ended(bare)
        assert not site.output(bare).strip().endswith("-cloud-amd64")
        held = site.until_state(refused, "HELD")
        assert "/etc" in held["HoldReason"] and (held["HoldReasonCode"], held["HoldReasonSubCode"]) == (3, 101)
        site.run_as(["condor_rm", refused])
        site.assert_nothing_left()
