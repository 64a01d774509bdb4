"""What comes to nothing: refused at submission, held with our words, requeued once; never run on the host."""

import shutil
from pathlib import Path

import pytest
from second_account import Second
from wnodes_htcondor.testing import SHARED, Site

pytestmark = [pytest.mark.condor, pytest.mark.guest]


@pytest.fixture(scope="module")
def second():
    with Second() as made:
        yield made


@pytest.fixture(scope="module")
def site(minimal_image, second):
    rules = f"policy:\n  - users: ['*']\n    max_cpus: 1\n{second.rules()}"
    with Site(minimal_image, build=SHARED, settings=rules) as made:
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


def blah(site, requirements, name, more=""):
    """Submit through the real blahp script, as a computing element would, with its requirements as shell text."""
    libexec = site.lab.prefix / "usr/libexec/blahp"
    home = site.work / "grid"
    (home / ".blah").mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parents[2] / "hooks/blah/condor_local_submit_attributes.sh"
    (home / ".blah/condor_local_submit_attributes.sh").write_text(script.read_text())
    config = home / "blah.config"
    config.write_text(f"condor_binpath={site.lab.prefix}/usr/bin\nblah_libexec_directory={libexec}\n")
    (home / "requirements").write_text(requirements)
    (home / "job.sh").write_text(f"#!/bin/sh\nuname -r\n{more}")
    for path in (home, *home.rglob("*")):
        path.chmod(0o755)
        shutil.chown(path, site.user, site.user)
    words = ["-c", str(home / "job.sh"), "-o", str(site.work / name), "-e", "/dev/null", "-i", "/dev/null", "-w", str(home), "-m", "800"]
    environ = ["env", f"HOME={home}", f"BLAHPD_CONFIG_LOCATION={config}", f"GLITE_LOCATION={site.lab.prefix}/usr"]
    done = site.run_as([*environ, str(libexec / "condor_submit.sh"), *words, "-C", str(home / "requirements")], check=False)
    return done.text.partition("condor/")[2].partition("/")[0]


def test_a_grid_job_carries_its_vm_through_blah_and_becomes_another_account(site, second):
    job = blah(site, "WnodesImage=debian12\nWnodesMemory=700M\n", "grid-out", second.script)
    assert job, "blahp submitted nothing"
    fields = site.ended(job)
    assert (fields["vm_image"], fields["vm"]) == ("debian12", "memory=700M")
    release, *said = (site.work / "grid-out").read_text().splitlines()
    assert release.endswith("-cloud-amd64")
    second.check(site, job, said)
    site.assert_nothing_left()
    assert blah(site, "WnodesImage='x\nqueue 5'\n", "bad-out") == ""  # what is no word becomes "-", which the schedd refuses
