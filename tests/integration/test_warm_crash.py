"""kill -9 around warm start: of a template's builder at every moment, of a clone's processes at every journal line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wnodes_core import processes

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from lease_stage import WNODES, lines_in, real_image_fixture, stage_fixture, until  # noqa: E402, F401 - a fixture
from test_crash import AFTER, BEFORE, LIFE, RUNNING, name_of  # noqa: E402

pytestmark = pytest.mark.guest
WARM = "image=real,memory=512M,start=warm"
BUILD_S = 120.0


@pytest.fixture(scope="module")
def template(stage, real_image):
    """A template on the user's own shelf; its folder."""
    orders, _ = stage.orders(fake=False)
    done = stage.run(*stage.play(orders, "run", "-q", "--vm", WARM, "--", "echo", "ran"), timeout_s=BUILD_S)
    assert done.stdout == b"ran\n"
    return shelf_of(stage) / next(p.name for p in shelf_of(stage).iterdir() if (p / "template.json").exists())


def shelf_of(stage) -> Path:
    found = stage.run(WNODES, "config", "show").stdout.decode()
    line = next(line for line in found.splitlines() if "templates" in line and "folder" in line)
    return Path(next(word for word in line.split() if word.startswith("/")).rstrip(","))


def clone(stage, orders, *words, **more):
    command = words or ("echo", "from the guest")
    return stage.run(*stage.play(orders, "run", "--vm", WARM, "--", *command), check=False, **more)


def test_a_clone_has_the_life_of_any_lease(stage, template):
    orders, ledger = stage.orders(fake=False)
    began = time.monotonic()
    done = clone(stage, orders)
    assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr
    assert b"booting" not in done.stderr, done.stderr
    assert lines_in(ledger) == LIFE, time.monotonic() - began
    assert stage.left(ledger) == []


@pytest.mark.parametrize("moment", sorted(BEFORE + AFTER), ids=name_of)
def test_clone_killed_with_its_launcher(stage, template, moment):
    line, when = moment
    orders, ledger = stage.orders(fake=False, victim="both", line=line, when=when)
    assert clone(stage, orders).returncode == -9
    until(lambda: len(lines_in(ledger)) >= line - (when == "before"), "the keeper has come so far")
    stage.sweep(fake=False)
    assert stage.left(ledger) == []


@pytest.mark.parametrize("moment", AFTER, ids=name_of)
@pytest.mark.parametrize("victim", ["keeper", "launcher"])
def test_clone_killed_alone(stage, template, moment, victim):
    line, _ = moment
    orders, ledger = stage.orders(fake=False, victim=victim, line=line)
    done = clone(stage, orders)
    if victim == "keeper" and line <= RUNNING:
        assert (done.returncode, done.stdout) == (125, b"")
    stage.wait_for_nothing(ledger)


DEVICE = ["making attachment", "made attachment"]
PLUGGED = [*LIFE[:4], *DEVICE, *LIFE[4:6], "gone attachment", *LIFE[6:]]


@pytest.fixture
def plugged(stage):
    """Mounts are devices that are plugged into the clone."""
    settings = stage.home / ".config/wnodes/wnodes.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("storage: {order: [virtiofs]}\n")
    yield
    settings.unlink()


def test_a_clone_with_a_plugged_mount_has_the_life_of_any_lease(stage, template, plugged):
    orders, ledger = stage.orders(fake=False)
    done = clone(stage, orders, "sh", "-c", "grep -m1 -o ' virtiofs wnodes0' /proc/self/mountinfo; echo mine >written")
    assert (done.returncode, done.stdout) == (0, b" virtiofs wnodes0\n"), done.stderr
    assert b"booting" not in done.stderr, done.stderr
    assert lines_in(ledger) == PLUGGED
    assert (stage.work / "written").read_text() == "mine\n"
    assert stage.left(ledger) == []


@pytest.mark.parametrize(("line", "when"), [(5, "after"), (6, "before"), (6, "after"), (8, "before"), (9, "after"), (10, "after")])
def test_clone_with_a_plugged_mount_killed_with_its_launcher(stage, template, plugged, line, when):
    orders, ledger = stage.orders(fake=False, victim="both", line=line, when=when)
    assert clone(stage, orders).returncode == -9
    until(lambda: len(lines_in(ledger)) >= line - (when == "before"), "the keeper has come so far")
    stage.sweep(fake=False)
    assert stage.left(ledger) == []


def test_a_vm_that_dies_as_it_wakes_is_booted_instead(stage, template):
    orders, ledger = stage.orders(fake=False, victim="vm", line=LIFE.index("made vm") + 1)
    done = clone(stage, orders)
    assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr
    assert b"no clone: " in done.stderr
    assert b"booting" in done.stderr
    assert lines_in(ledger) == [*LIFE[:4], "gone vm", "gone disk", *LIFE]
    assert stage.left(ledger) == []


def test_clone_killed_while_the_command_runs(stage, template):
    orders, ledger = stage.orders(fake=False)
    words = ["run", "-q", "--vm", WARM, "--", "sh", "-c", "echo up; sleep 600"]
    with stage.start(*stage.play(orders, *words)) as launcher:
        assert launcher.stdout.readline() == b"up\n"
        stage.kill(ledger, "vm")
        assert launcher.wait(15) == 125
    assert stage.left(ledger) == []


@pytest.mark.parametrize("name", ["memory", "state", "argv.json"])
def test_a_harmed_template_is_built_anew(stage, template, name):
    path = shelf_of(stage) / template.name / name
    os.chmod(path, 0o644)
    os.truncate(path, 100)
    orders, ledger = stage.orders(fake=False)
    done = clone(stage, orders, timeout_s=BUILD_S)
    assert (done.returncode, done.stdout) == (0, b"from the guest\n"), done.stderr
    assert b"building a template" in done.stderr or b"no clone" not in done.stderr
    assert (shelf_of(stage) / template.name / name).stat().st_size != 100
    assert stage.left(ledger) == []


# the builder


def _builder(folder: Path):
    """The builder and the QEMU of a folder."""
    return [p for p in processes.table() if any(str(folder) in word for word in p.command)]


MOMENTS = {
    "folder-made": lambda folder: True,
    "disk-made": lambda folder: b'"op": "made", "kind": "disk"' in (folder / "journal").read_bytes(),
    "vm-wanted": lambda folder: b'"op": "making", "kind": "vm"' in (folder / "journal").read_bytes(),
    "vm-made": lambda folder: b'"op": "made", "kind": "vm"' in (folder / "journal").read_bytes(),
    "saved": lambda folder: (folder / "state").exists(),
    "told": lambda folder: (folder / "made.json").exists(),
}


@pytest.mark.parametrize(
    ("victim", "moment"),
    [("builder", "vm-made"), ("builder", "saved"), *(("both", moment) for moment in MOMENTS if moment != "vm-made")],
)
def test_builder_killed(stage, real_image, moment, victim):
    """Its own memory size makes it a template of its own."""
    shelf = shelf_of(stage)
    request = "image=real,memory=300M,start=warm"
    orders, ledger = stage.orders(fake=False)
    words = ["run", "--vm", request, "--", "echo", "ran"]
    with stage.start(*stage.play(orders, *words)) as launcher:
        folder = until(lambda: next(shelf.glob("building-*"), None), "a builder's folder", BUILD_S)
        until(lambda: _reached(MOMENTS[moment], folder), moment, BUILD_S)
        for process in processes.table():
            if process.command[-1:] == ("wnodes_core.templates.build",) and process.uid == stage.user.pw_uid:
                os.kill(process.pid, signal.SIGKILL)
        if victim == "both":
            launcher.kill()
        out, err = launcher.communicate(timeout=BUILD_S)
    if victim == "builder" and moment != "told":
        # It was asked to be warm and is not, but it runs: a builder's end is no job's.
        assert (launcher.returncode, out) == (0, b"ran\n"), err
        assert b"no warm start: " in err
    # The next call cleans up, and builds what was not built.
    done = stage.run(*stage.play(stage.orders(fake=False)[0], *words), timeout_s=BUILD_S)
    assert done.stdout == b"ran\n"
    assert list(shelf.glob("building-*")) == []
    assert _builder(folder) == []
    assert stage.left(ledger) == []
    for path in shelf.glob("*/template.json"):
        if b'"memory_mib": 256' in path.read_bytes():
            subprocess.run(["rm", "-rf", path.parent], check=True)


def _reached(moment, folder: Path) -> bool:
    try:
        return bool(moment(folder))
    except OSError:
        return not folder.exists()
