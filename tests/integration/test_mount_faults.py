"""A lease whose gateway hangs or dies ends like any other, in time, and leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wnodes_core import processes

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from lease_stage import WNODES, stage_fixture, until  # noqa: E402, F401 - fixtures

pytestmark = pytest.mark.guest
END_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def store(stage, minimal_image):
    """The small guest in the user's own store."""
    stage.leases = Path(f"/var/tmp/wnodes-{stage.user.pw_uid}")
    boot = minimal_image.boot
    kernel = ["--kernel", boot.kernel, "--initrd", boot.initrd]
    stage.run(WNODES, "image", "add", "-q", *kernel, "--cmdline", boot.cmdline, "debian12", minimal_image.path)
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def gateway_of(folder: Path) -> processes.Process:
    (found,) = [each for each in processes.table() if "-d" in each.command and str(folder) in each.command]
    return found


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_the_lease_ends_in_time_and_leaves_nothing(stage, number):
    script = "echo up; read word; echo x >late && echo written; exit 7" if number == signal.SIGKILL else "echo up; read word; exit 7"
    argv = [WNODES, "run", "-q", "--image", "debian12", "--", "sh", "-c", script]
    with stage.start(*argv, stdin=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == b"up\n", launcher.communicate(timeout=10)
        gateway = gateway_of(stage.work)
        os.kill(gateway.pid, number)
        began = time.monotonic()
        out, err = launcher.communicate(b"on\n", timeout=END_S + 20)
        assert time.monotonic() - began < END_S
    assert launcher.returncode == 7, (out, err)
    assert b"written" not in out and not (stage.work / "late").exists(), "it wrote into a folder of the guest's"
    # ENOTCONN; in the very moment of the abort ECONNABORTED, or EIO where sshfs still answers and its server does not.
    said = (b"not connected", b"connection abort", b"Input/output error")
    assert number == signal.SIGSTOP or any(words in err for words in said), err
    until(lambda: not processes.alive(gateway), "the gateway's end")
    assert not stage.lease_folders()
