"""Our signature: kill -9 of anybody, at every line that a lease's journal ever has, leaves nothing.

The fake backend plays QEMU, everything else is real: launcher, keeper, agent, gateway, journal. The moments that
matter most are in ``test_crash_guest.py`` with a real one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lease_stage import LIFE, RUNNING, fake_images, lines_in, stage_fixture, until  # noqa: E402, F401 - fixtures

AFTER = [(line, "after") for line in range(1, len(LIFE) + 1)]
# Before the line is another moment than after the one before it only where something was done meanwhile.
BEFORE = [(n, "before") for n, line in enumerate(LIFE, 1) if not line.startswith("making")]
MOMENTS = sorted(BEFORE + AFTER)


def name_of(moment):
    line, when = moment
    return f"{when}-{LIFE[line - 1].replace(' ', '-')}"


every_moment = pytest.mark.parametrize("moment", MOMENTS, ids=name_of)
every_line = pytest.mark.parametrize("moment", AFTER, ids=name_of)


@pytest.fixture(scope="module", autouse=True)
def images(stage):
    fake_images(stage)


def run(stage, orders, *words, **more):
    command = words or ("echo", "from the guest")
    return stage.run(*stage.play(orders, "run", "--image", "good", "--", *command), check=False, **more)


def test_the_life_of_a_lease_has_these_lines(stage):
    orders, ledger = stage.orders()
    done = run(stage, orders)
    assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr
    assert lines_in(ledger) == LIFE
    assert stage.left(ledger) == []


@every_moment
def test_keeper_killed(stage, moment):
    line, when = moment
    orders, ledger = stage.orders(victim="keeper", line=line, when=when)
    done = run(stage, orders)
    # The launcher itself cleans up: nothing is left when it has ended.
    assert stage.left(ledger) == []
    if line <= RUNNING:
        assert done.returncode == 125
        assert b"keeper" in done.stderr
        assert done.stdout == b""
    else:
        assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr
    assert lines_in(ledger) == LIFE[: line - (when == "before")]


@every_moment
def test_launcher_killed(stage, moment):
    line, when = moment
    orders, ledger = stage.orders(victim="launcher", line=line, when=when)
    assert run(stage, orders).returncode == -9
    # The keeper lives, and cleans up.
    stage.wait_for_nothing(ledger)
    assert set(lines_in(ledger)) <= set(LIFE)


@every_moment
def test_launcher_and_keeper_killed(stage, moment):
    line, when = moment
    orders, ledger = stage.orders(victim="both", line=line, when=when)
    assert run(stage, orders).returncode == -9
    until(lambda: len(lines_in(ledger)) >= line - (when == "before"), "the keeper has come so far")
    assert stage.left(ledger) != []
    # The next call cleans up.
    stage.sweep()
    assert stage.left(ledger) == []


@every_line
def test_vm_killed(stage, moment):
    line, when = moment
    orders, ledger = stage.orders(victim="vm", line=line, when=when)
    done = run(stage, orders, *(("sleep", "60") if line == RUNNING else ()))
    assert stage.left(ledger) == []
    assert lines_in(ledger)[-1] == LIFE[-1]
    if LIFE.index("made vm") < line <= RUNNING:
        assert done.returncode == 125
        assert b"the VM ended while" in done.stderr
        # Killed at once it may not have said a word yet; the message then says so.
        assert b"console: fake guest: booting" in done.stderr or b"wrote nothing to its console" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr


@pytest.mark.parametrize("victim", ["keeper", "launcher", "both"])
def test_killed_while_the_command_runs(stage, victim):
    orders, ledger = stage.orders()
    launcher = stage.start(*stage.play(orders, "run", "-q", "--image", "good", "--", "sh", "-c", "echo up; sleep 60"))
    with launcher:
        assert launcher.stdout.readline() == b"up\n"
        stage.kill(ledger, "keeper", victim in ("keeper", "both"))
        if victim != "keeper":
            launcher.kill()
        code = launcher.wait(15)
    assert code == (125 if victim == "keeper" else -9)
    if victim == "both":
        stage.sweep()
    stage.wait_for_nothing(ledger, patience_s=0 if victim != "launcher" else 5)


def test_a_second_crash_while_the_first_is_being_undone(stage):
    orders, ledger = stage.orders(victim="both", line=RUNNING)
    assert run(stage, orders).returncode == -9
    journal = next(stage.leases.glob("local-*/journal"))
    torn = journal.read_bytes()
    journal.write_bytes(torn + b'\n{"op": "gone", "kind": "attach')
    stage.sweep()
    assert stage.left(ledger) == []


def test_the_sweep_spares_the_living(stage):
    orders, ledger = stage.orders()
    launcher = stage.start(
        *stage.play(orders, "run", "-q", "--image", "good", "--", "sh", "-c", "echo up; read x; echo $x"),
        stdin=subprocess.PIPE,
    )
    with launcher:
        assert launcher.stdout.readline() == b"up\n"
        stage.sweep()
        out, err = launcher.communicate(b"still here\n", timeout=15)
    assert (launcher.returncode, out) == (0, b"still here\n"), err
    assert stage.left(ledger) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("never-boots", "did not answer within 1 s; its console ended with\n  console: fake guest: booting"),
        ("panics", "the VM ended while it started; its console ended with\n  console: Kernel panic - not syncing"),
        ("dies", "the fake QEMU ended as it started"),
        ("cut-channel", "guest channel"),
    ],
)
def test_a_failing_guest_ends_in_a_message_and_leaves_nothing(stage, image, words):
    config = stage.folder / "impatient.yaml"
    config.write_text("vm: {boot_timeout_s: 1s}\n" if image == "never-boots" else "")
    orders, ledger = stage.orders()
    argv = stage.play(orders, "run", "--image", image, "--", "head", "-c", "1000000", "/dev/zero")
    done = stage.run(*argv, check=False, environ=stage.environ(WNODES_CONFIG=config))
    assert done.returncode == 125
    assert words in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"bug" not in done.stderr
    assert stage.left(ledger) == []


@pytest.fixture
def small_disk(stage):
    """The leases on a file system of 1 MiB."""
    small, leases = stage.folder / "small", stage.leases
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,uid={stage.user.pw_uid}", "none", small], check=True)
    stage.leases = small / "l"
    yield
    stage.leases = leases
    subprocess.run(["umount", small], check=True)
    small.rmdir()


@every_moment
def test_disk_full(stage, small_disk, moment):
    line, when = moment
    orders, ledger = stage.orders(victim="disk", line=line, when=when)
    done = run(stage, orders)
    assert stage.left(ledger) == [], done.stderr
    if done.returncode:
        assert (done.returncode, done.stdout) == (125, b"")
        # The fake guest writes its files there too, and may be the first to trip.
        assert b"No space left on device" in done.stderr or b"the VM ended while it started" in done.stderr
    else:  # a line or two still fit in the journal's last block
        assert done.stdout == b"from the guest\n"


def test_disk_full_from_the_beginning(stage, small_disk):
    stage.run("sh", "-c", 'mkdir -m 700 "$1"; cat /dev/zero > "$1/.filler"; true', "sh", stage.leases)
    orders, ledger = stage.orders()
    done = run(stage, orders)
    assert done.returncode == 125
    assert b"No space left on device\n  hint: free space" in done.stderr
    assert stage.left(ledger) == []
