"""A job in a VM is the job it was: files, streams, exit, signals, sizes, every way that HTCondor ends it."""

import os

import pytest
from wnodes_htcondor.testing import SHARED, Site, until

pytestmark = [pytest.mark.condor, pytest.mark.guest]
TRAP = "trap 'echo term > {work}/term-{name}; exit 3' TERM; echo up > {work}/up-{name}; while :; do sleep 0.2; done"


@pytest.fixture(scope="module")
def site(minimal_image):
    with Site(minimal_image, build=SHARED, cpus=4, kill_wait_s=5) as made:
        yield made


@pytest.fixture(autouse=True)
def queue_is_empty(site):
    yield
    site.remove_all()


def trapped(site, name, *lines):
    """A job that notes SIGTERM in the user's own folder, once it runs."""
    job = site.submit(TRAP.format(work=site.work, name=name), f'vm = "mount={site.work}"', *lines)
    until(lambda: (site.work / f"up-{name}").exists(), f"start of {name}: {site.show(job)} {site.log()[-1000:]}", 90)
    return job


def test_streams_files_sizes_and_ends(site):
    """Four jobs at a time, each in a VM of its own."""
    blob = os.urandom(300_000)
    (site.work / "blob").write_bytes(blob)
    (site.work / "deep").mkdir()
    (site.work / "deep" / "leaf").write_text("leaf\n")
    streams = site.submit(
        "cat; echo to-stderr >&2; mkdir sub; echo x > sub/y; cp deep/leaf new", "input = blob", "transfer_input_files = deep"
    )
    sizes = site.submit("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo", "request_cpus = 2", "request_memory = 1024")
    dead = site.submit("kill -KILL $$")
    named = site.submit("echo $FOO; echo \"$@\"; echo $HOME; echo $_CONDOR_SLOT; condor_chirp set_job_attr_delayed ChirpTest 5; env", 'arguments = "a \'b c\' wnodes:x"',
                        'environment = "FOO=\'bar baz\'"', 'vm = "image=debian12,trace=yes"', image="")  # fmt: skip
    assert site.exit_code(streams) == 0 if site.ended(streams) else None
    assert (site.work / f"out-{streams}-0").read_bytes() == blob
    assert "to-stderr" in site.errors(streams) and (site.work / "new").read_text() == "leaf\n"
    assert not (site.work / "sub").exists()  # HTCondor brings new files back, and no folders, as ever
    site.ended(sizes)
    cpus, memory = site.output(sizes).split()
    assert cpus == "2" and 560_000 < int(memory) < 1024 * 1024 - 320 * 1024
    assert site.ended(dead)["ExitBySignal"] is True and site.exit_code(dead) == -9
    assert site.ended(named)["ChirpTest"] == 5
    lines = site.output(named).splitlines()
    assert lines[:2] == ["bar baz", "a b c wnodes:x"] and lines[2].startswith(str(site.lab.folder)) and lines[3].startswith("slot1_")
    assert not [line for line in lines if line.startswith(("SINGULARITYENV_", "WNODES_CHIRP"))]
    site.assert_nothing_left()


def test_ssh_to_job_lands_in_the_vm(site):
    job = trapped(site, "ssh")
    ssh = ["condor_ssh_to_job", "-auto-retry", f"{job}.0"]
    done = site.run_as([*ssh, "uname -r; pwd; echo $_CONDOR_SLOT; hostname; cat >/dev/null; exit 9"], check=False)
    release, folder, slot, host = done.text.splitlines()[-4:]
    assert release.endswith("-cloud-amd64") and folder.startswith(str(site.lab.folder)) and host.startswith(f"wn-{job}-0")
    assert slot.startswith("slot1_") and done.exit_code == 9
    bare = site.submit("sleep 60", image="")
    site.until_state(bare, "RUNNING")
    done = site.run_as(["condor_ssh_to_job", "-auto-retry", f"{bare}.0", "uname -r"], check=False)
    assert done.text.strip().splitlines()[-1] == os.uname().release
    site.run_as(["condor_rm", job, bare])
    until(lambda: (site.work / "term-ssh").exists(), "SIGTERM in the guest")
    site.assert_nothing_left()


def test_hold_release_vacate_remove(site):
    held = trapped(site, "again")
    site.run_as(["condor_hold", held])
    until(lambda: (site.work / "term-again").exists(), "SIGTERM of condor_hold")
    assert site.until_state(held, "HELD")["HoldReasonCode"] == 1
    for words in (["condor_release", held], ["condor_vacate_job", held]):
        for name in ("up-again", "term-again"):
            (site.work / name).unlink(missing_ok=True)
        site.run_as(words)
        until(lambda: (site.work / "up-again").exists(), f"a run after {words[0]}", 90)
    assert site.show(held)["NumShadowStarts"] >= 3
    site.run_as(["condor_rm", held])
    site.ended(held)
    site.assert_nothing_left()


def test_policy_ends_jobs(site):
    booting = site.submit("touch here", 'vm = "start=cold"', "periodic_remove = JobStatus == 2 && time() - EnteredCurrentStatus > 2")
    limited = trapped(site, "limited", "allowed_execute_duration = 12")
    fields = site.until_state(limited, "HELD")
    assert fields["HoldReasonCode"] == 47 and (site.work / "term-limited").exists()
    assert site.ended(booting)["JobStatus"] == 3 and not (site.work / "here").exists()
    site.run_as(["condor_rm", limited])
    site.assert_nothing_left()


def test_a_job_that_ignores_sigterm_is_killed_with_its_vm(site):
    job = site.submit(f"trap '' TERM; touch {site.work}/deaf; while :; do sleep 1; done", f'vm = "mount={site.work}"')
    until(lambda: (site.work / "deaf").exists(), "start", 90)
    site.run_as(["condor_rm", job])
    site.assert_nothing_left(40)


def test_jobs_match_the_nodes_that_hold_their_image(site):
    assert site.slots("WnodesAccel") == {"tcg"} and "debian12" in "".join(site.slots("WnodesImages"))
    other = site.submit("true", image="no-such-image")
    tagged = site.submit("true", image="debian12:latest")
    assert site.exit_code(tagged) == 0 if site.ended(tagged) else None
    assert site.state(other) == "IDLE"
    told = site.lab.run(["condor_q", "-better-analyze", f"{other}.0"], check=False)
    assert "WnodesImages" in told and "No machines matched" in told
    site.run_as(["condor_rm", other])
    site.assert_nothing_left()
