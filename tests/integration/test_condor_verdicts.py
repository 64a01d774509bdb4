"""What comes to nothing: refused at submission, held with our words, requeued once; never run on the host."""

import pytest
from wnodes_htcondor.testing import Site, until

pytestmark = [pytest.mark.condor, pytest.mark.guest]


@pytest.fixture(scope="module")
def site(minimal_image):
    rules = "policy:\n  - users: ['*']\n    max_cpus: 1\n"
    with Site(minimal_image, settings=rules) as made:
        yield made


def refused(site, *lines, image="debian12"):
    """What condor_submit says to a request."""
    (site.work / "bad.sub").write_text("\n".join(["executable = /bin/true", *([f"vm_image = {image}"] if image else []), *lines, "queue\n"]))
    done = site.run_as(["condor_submit", "bad.sub"], check=False)
    assert done.exit_code != 0, done.text
    return done.stderr.decode()


def test_a_bad_request_is_refused_while_the_user_watches(site):
    assert "vm_image 'el 9': want NAME, NAME:TAG or NAME@sha256:DIGEST" in refused(site, image="el 9")
    assert "vm 'cpu=2': want KEY=VALUE" in refused(site, 'vm = "cpu=2"')
    assert "want universe = vanilla" in refused(site, "universe = scheduler")


def test_hold_is_a_held_job_with_our_words(site):
    job = site.submit("echo ran-on-$(hostname)", 'vm = "cpus=2"', "request_cpus = 2")
    fields = site.until_state(job, "HELD")
    assert fields["HoldReason"].startswith("wnodes: cpus 2 asked for, the site allows a VM 1"), fields["HoldReason"]
    assert (fields["HoldReasonCode"], fields["HoldReasonSubCode"]) == (3, 101)
    assert "cpus 2 asked for" in site.errors(job) and "ran-on" not in site.output(job)
    site.run_as(["condor_rm", job])
    site.assert_nothing_left()
