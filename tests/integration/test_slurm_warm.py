"""Warm start under a real Slurm: templates that wnodesd builds, clones for other users' jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from second_account import Second
from slurm_site import Site, until

from wnodes_core.model import Image

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
WHO = "cat /proc/sys/kernel/random/boot_id; hostname; free -m | awk '/^Mem/ {print $2}'; touch made-$SLURM_JOB_ID"
SETTINGS = """\
policy:
  - images: ["*"]
    allow_mounts: [/]
  - queues: [io]
    storage: [virtiofs, sshfs]
"""
QUEUES = [f"PartitionName={name} Nodes=ALL MaxTime=INFINITE State=UP" for name in ("io", "grid")]


@pytest.fixture(scope="module")
def second() -> Iterator[Second]:
    with Second() as second:
        yield second


@pytest.fixture(scope="module")
def site(minimal_image: Image, second: Second) -> Iterator[Site]:
    with Site(minimal_image, "w", build="on_use", settings=SETTINGS + second.rules("io", "grid"), extra=QUEUES) as site:
        yield site


def _templates(site: Site) -> list[Path]:
    return sorted((site.folder / "state/templates").glob("*/template.json"))


def _ran(site: Site, *options: str, second: Second | None = None) -> tuple[list[str], list[str]]:
    """A job's output and the phases of its start; with ``second`` it is a pilot's that uses another account."""
    job = site.submit(WHO + (second.script if second else ""), *options)
    end = site.ended(job)
    assert end["JobState"] == "COMPLETED", (end, site.output(job), site.log()[-3000:])
    assert (site.work / f"made-{job}").stat().st_uid == site.work.stat().st_uid
    if second:
        second.check(site, job, site.output(job).splitlines())
    return site.output(job).splitlines(), [step[0] for step in site.lease(job)["trace"]]


def test_the_first_job_boots_and_the_next_are_clones(site: Site, second: Second) -> None:
    """And a pilot becomes another account in the first two."""
    cold, phases = _ran(site, "--partition=grid", second=second)
    assert "boot" in phases and "clone" not in phases
    until(lambda: _templates(site), f"template; {site.log()[-2000:]}", 120)
    first, phases = _ran(site, "--partition=grid", second=second)
    assert "clone" in phases and "boot" not in phases, (phases, first, site.log()[-2000:])
    second, phases = _ran(site, "--mem-per-cpu=1500")
    assert "clone" in phases and "boot" not in phases, phases
    assert len({run[0] for run in (cold, first, second)}) == 3, "boot ids"
    assert len({run[1] for run in (cold, first, second)}) == 3, "host names"
    assert int(second[2]) > int(first[2]) + 600, (first, second)
    site.assert_nothing_left()


def test_the_user_says_how_the_vm_comes_up_and_sees_where_the_time_went(site: Site) -> None:
    until(lambda: _templates(site), "template", 120)
    _, phases = _ran(site, "--vm-start=cold")
    assert "boot" in phases and "clone" not in phases, phases
    out, phases = _ran(site, "--vm-start=warm", "--vm=start=cold,trace=yes")
    assert phases[:5] == ["admit", "image", "launcher", "lease", "keeper"] and "clone" in phases, phases
    line = r"wnodes: warm start in \d+\.\d{3} s \(.*keeper .*clone .*wake .*\)"
    assert re.fullmatch(line, out[0]), out
    start = next(each["start"] for each in site.ask({"op": "leases", "ended": True})["leases"][::-1] if each["start"])
    assert start["kind"] == "warm" and start["way"] and start["template"] and not start["fallback"], start
    site.assert_nothing_left()


@pytest.mark.parametrize(("start", "phase"), [("warm", "clone"), ("cold", "boot")])
def test_a_queue_whose_files_come_by_a_device(site: Site, second: Second, start: str, phase: str) -> None:
    """virtiofs by a rule of the policy: the same folder, as the same user, in a clone of another's as in a VM booted.

    A second account's comes by sshfs.
    """
    until(lambda: _templates(site), "template", 120)
    script = "findmnt -n -o FSTYPE -T . ; stat -c %U .; echo in > made-here; stat -c %U made-here"
    job = site.submit(f"{second.script}{script}", "--partition=io", f"--vm-start={start}")
    end = site.ended(job)
    assert end["JobState"] == "COMPLETED", (end, site.output(job), site.log()[-3000:])
    owner = site.work.owner()
    assert site.output(job).split()[-3:] == ["virtiofs", owner, site.user], site.output(job)
    assert ((site.work / "made-here").read_text(), (site.work / "made-here").owner()) == ("in\n", site.user)
    (site.work / "made-here").unlink()
    phases = {step[0] for step in site.lease(job)["trace"]}
    assert phases & {"boot", "clone"} == {phase}, (phases, site.log()[-2000:])
    second.check(site, job, site.output(job).splitlines()[:-3], "virtiofs")
    site.assert_nothing_left()


def test_a_template_that_was_altered_is_never_cloned(site: Site) -> None:
    until(lambda: _templates(site), "template", 120)
    for each in _templates(site):
        with open(each.with_name("memory"), "r+b") as memory:
            memory.seek(4096)
            memory.write(b"altered")
    _, phases = _ran(site)
    assert "boot" in phases and "clone" not in phases, phases
