"""The crashes of ``test_crash.py`` with a real guest in QEMU, by real libvirt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from wnodes_core.processes import alive

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from lease_stage import LIFE, RUNNING, lines_in, processes_in, real_image_fixture, stage_fixture, until  # noqa: E402, F401 - fixtures

pytestmark = pytest.mark.guest
REAL = {
    "before-the-overlay": (LIFE.index("making disk") + 1, "after"),
    "after-the-overlay": (LIFE.index("made disk") + 1, "after"),
    "before-the-vm": (LIFE.index("making vm") + 1, "after"),
    "vm-started-but-not-noted": (LIFE.index("made vm") + 1, "before"),
    "while-booting": (LIFE.index("made vm") + 1, "after"),
    "gateway-started-but-not-noted": (LIFE.index("made attachment") + 1, "before"),
    "with-the-mount": (RUNNING, "after"),
}


@pytest.mark.parametrize("moment", REAL.values(), ids=REAL)
@pytest.mark.parametrize("victim", ["both", "keeper"])
def test_real_guest_killed_at(stage, real_image, moment, victim):
    line, when = moment
    orders, ledger = stage.orders(fake=False, victim=victim, line=line, when=when)
    done = stage.run(*stage.play(orders, "run", "--image", real_image, "--", "echo", "ran"), check=False)
    assert (done.returncode, done.stdout) == (-9 if victim == "both" else 125, b""), done.stderr
    if victim == "both":
        until(lambda: len(lines_in(ledger)) >= line - (when == "before"), "the keeper has come so far")
        assert stage.left(ledger) != []
        stage.sweep(fake=False)
    assert stage.left(ledger) == []


@pytest.mark.parametrize("victim", ["keeper", "launcher", "both", "vm"])
def test_real_guest_killed_while_the_command_runs(stage, real_image, victim):
    orders, ledger = stage.orders(fake=False)
    words = ["run", "-q", "--image", real_image, "--", "sh", "-c", "echo up; sleep 600"]
    with stage.start(*stage.play(orders, *words)) as launcher:
        assert launcher.stdout.readline() == b"up\n"
        stage.kill(ledger, "keeper", victim in ("keeper", "both"))
        stage.kill(ledger, "vm", victim == "vm")
        if victim in ("launcher", "both"):
            launcher.kill()
        code = launcher.wait(15)
    assert code == (125 if victim in ("keeper", "vm") else -9)
    if victim == "both":
        stage.sweep(fake=False)
    stage.wait_for_nothing(ledger, patience_s=5 if victim == "launcher" else 0)


@pytest.mark.parametrize("delay_s", [0.05, 0.1, 0.2])  # or when libvirt has done, if that comes first
def test_real_guest_killed_while_libvirt_starts_it(stage, real_image, delay_s):
    line = LIFE.index("making vm") + 1
    orders, ledger = stage.orders(fake=False, victim="both", line=line, delay_s=delay_s)
    done = stage.run(*stage.play(orders, "run", "--image", real_image, "--", "echo", "ran"), check=False)
    assert (done.returncode, lines_in(ledger)) == (-9, LIFE[:line])
    until(lambda: not any(kind == "keeper" for kind, p in processes_in(ledger) if alive(p)), "the keeper is dead")
    stage.sweep(fake=False)
    assert stage.left(ledger) == []
