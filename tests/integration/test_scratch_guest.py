"""A scratch disk in a real VM: who sees it, how large it is, what a full one is, and that it goes."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from lease_stage import WNODES, stage_fixture  # noqa: E402, F401 - fixtures

pytestmark = pytest.mark.guest
SCRIPT = """
set -u
stat -f -c '%T' /tmp /var/tmp /scratch
stat -c '%a %u' /tmp /scratch
grep -c 'nosuid,nodev.* /tmp ' /proc/self/mountinfo || grep ' /tmp ' /proc/self/mountinfo
head -c 100M /dev/zero >/tmp/most && echo 100M fit
head -c 400M /dev/zero >/scratch/more || echo code $?
rm /scratch/more; echo x >/var/tmp/again && echo room again
printf '#!/bin/sh\\necho runs\\n' >/tmp/run; chmod 755 /tmp/run; /tmp/run
echo y >root-disk && echo the work folder is not full
"""


@pytest.fixture(scope="module")
def said(stage, minimal_image):
    """What a job with 300 MiB of scratch saw, its stderr, and what was left of it."""
    stage.leases = Path(f"/var/tmp/wnodes-{stage.user.pw_uid}")
    boot = minimal_image.boot
    kernel = ["--kernel", boot.kernel, "--initrd", boot.initrd]
    stage.run(WNODES, "image", "add", "-q", *kernel, "--cmdline", boot.cmdline, "debian12", minimal_image.path)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return stage.run(WNODES, "run", "--image", "debian12", "--scratch", "300M", "--trace", "--", "sh", "-c", SCRIPT)


@pytest.fixture(scope="module")
def warm(said, stage):
    """The same in a clone, which costs no boot."""
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["run", "--image", "debian12", "--scratch", "300M", "--start=warm", "--trace", "--", "sh", "-c", SCRIPT]
        return stage.run(WNODES, *words, timeout_s=120)


def test_a_clone_has_its_scratch_too(warm, said, stage):
    assert b"no clone" not in warm.stderr and b" warm" in warm.stderr, warm.stderr
    # But for the mount's number and the disk's.
    told, booted = ([line for line in done.stdout.splitlines() if b" /tmp " not in line] for done in (warm, said))
    assert told == booted
    assert b"No space left on device" in warm.stderr
    assert not list(stage.leases.rglob("scratch*"))


def test_temporary_folders_lie_on_the_scratch_disk(said):
    lines = said.stdout.decode().splitlines()
    assert lines[:3] == ["ext2/ext3"] * 3
    assert lines[3:5] == ["1777 0"] * 2
    assert "runs" in lines


def test_a_full_scratch_is_the_jobs_enospc_and_nothing_else_is_full(said):
    text = said.stdout.decode()
    assert "100M fit\n" in text and "code 1\n" in text and "room again\n" in text
    assert "the work folder is not full" in text
    assert b"No space left on device" in said.stderr


def test_making_it_is_a_phase_and_nothing_stays(said, stage):
    assert any(line.startswith("scratch") for line in said.stderr.decode().splitlines()), said.stderr
    assert not list(stage.leases.rglob("scratch*"))
