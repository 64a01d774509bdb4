"""The keeper: what it tells, what ends it, and that nothing of the VM outlives it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import history, mounting
from wnodes_core import keeper as keeper_module
from wnodes_core.errors import BootTimeout, GuestPanic, WnodesError
from wnodes_core.files import remove_tree
from wnodes_core.keeper import Keeper
from wnodes_core.keeper_process import SHRUGGED_OFF
from wnodes_core.trace import Trace

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import FAKE, Stand  # noqa: E402

PATIENCE_S = 15


class Holding:
    """wnodesd's side of a lease; ``on_state`` may act when the keeper tells a state."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.on_state: dict[str, Callable[[], Any]] = {}
        self.end: Callable[[str], None] = lambda reason: None

    def start(self, on_end: Callable[[str], None]) -> None:
        self.end = on_end

    def tell(self, facts: dict[str, Any]) -> None:
        self.told.append(facts)
        self.on_state.pop(facts["state"], lambda: None)()

    async def finish(self, facts: dict[str, Any]) -> None:
        self.told.append(facts)

    async def verdict(self, error: WnodesError) -> WnodesError:
        return error

    @property
    def states(self) -> list[str]:
        return [facts["state"] for facts in self.told]

    @property
    def error(self) -> dict[str, str]:
        return next(facts["error"] for facts in self.told if "error" in facts)


@pytest.fixture
def stand() -> Iterator[Stand]:
    """A stand in a short private folder: names of sockets have 107 bytes."""
    root = Path(tempfile.mkdtemp(prefix="wnk-"))
    folder = root / "l"
    folder.mkdir()
    stand = Stand(folder)
    yield stand
    left = stand.left() if folder.exists() else []
    remove_tree(root)
    assert not left, "\n".join(left)


@pytest.fixture(autouse=True)
def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that fails waits for its launcher; here most have none."""
    monkeypatch.setattr(keeper_module, "HEARD_S", 0.05)


@pytest.fixture
def holding() -> Holding:
    return Holding()


def keep(stand: Stand, holding: Holding | None, launcher: int = 0, trace: Trace | None = None) -> Keeper:
    """Run a keeper in this process to its end."""
    made: list[Keeper] = []

    async def run() -> None:
        made.append(Keeper(stand.plan, stand.plugins.hook, holding, launcher, trace))  # type: ignore[arg-type]
        await asyncio.wait_for(made[0].run(), PATIENCE_S)
        await asyncio.sleep(0)

    try:
        asyncio.run(run())
    finally:
        made[0].journal.close() if holding else None
    return made[0]


def test_a_lease_under_wnodesd_from_start_to_end(stand: Stand, holding: Holding) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.append(holding.told[-1])
        holding.end("the job is over")

    holding.on_state["running"] = look
    keep(stand, holding)
    assert holding.states == ["starting", "running", "ending", "gone"]
    assert seen[0]["vm_pid"] > 0
    steps = holding.told[-1]["trace"]
    assert [step.name for step in steps] == ["keeper", "overlay", "define", "boot", "agent", "mount", "teardown"]
    assert [step.begin for step in steps] == sorted(step.begin for step in steps)
    assert holding.told[-1]["start"] == {"kind": "cold", "way": "", "template": "", "fallback": ""}
    assert 0 <= holding.told[-1]["origin"] <= time.monotonic()
    assert holding.told[-1]["reason"] == "the job is over"
    assert "error" not in holding.told[-1]
    # The folder is wnodesd's to remove, the keeper's socket is not.
    assert stand.folder.exists()
    assert not (stand.folder / "keeper.sock").exists()


def test_the_trace_goes_on_where_the_launchers_ended(stand: Stand, holding: Holding) -> None:
    began = time.monotonic() - 1.5
    theirs = {"origin": began, "steps": [["launcher", 0.0, 0.5], ["lease", 0.5, 0.75]]}
    holding.on_state["running"] = lambda: holding.end("enough")
    keep(stand, holding, trace=Trace.from_dict(theirs))
    launcher, lease, keeper, overlay, *_ = holding.told[-1]["trace"]
    assert (launcher, lease) == (("launcher", 0.0, 0.5), ("lease", 0.5, 0.75))
    assert keeper.name == "keeper" and keeper.begin == pytest.approx(1.25, abs=0.001)
    assert 1.5 <= keeper.end <= overlay.begin + 0.001
    assert holding.told[-1]["origin"] == began


def test_lease_json_says_who_keeps_what_for_whom(stand: Stand, holding: Holding) -> None:
    lease: dict[str, Any] = {}
    holding.on_state["ending"] = lambda: lease.update(json.loads((stand.folder / "lease.json").read_text()))
    holding.on_state["running"] = lambda: holding.end("enough")
    keep(stand, holding)
    assert lease["id"] == stand.plan.lease
    assert (lease["user"], lease["image"], lease["job_id"], lease["state"]) == ("ann", "deb:1", "7", "running")
    assert lease["keeper"]["pid"] == os.getpid()
    assert (stand.folder / "lease.json").stat().st_mode & 0o777 == 0o600


def test_an_end_while_the_vm_starts_is_obeyed_at_once(stand: Stand, holding: Holding) -> None:
    stand.fault("never-boots", boot_timeout_s=60)
    began = time.monotonic()
    holding.on_state["starting"] = lambda: asyncio.get_running_loop().call_later(0.3, lambda: holding.end("off"))
    keep(stand, holding)
    assert time.monotonic() - began < 10
    assert holding.states == ["starting", "ending", "gone"]


@pytest.mark.parametrize(
    ("fault", "kind"), [("never-boots", BootTimeout), ("panics", GuestPanic)], ids=["never-boots", "panics"]
)
def test_a_failure_is_told_as_the_verdict_it_is(
    stand: Stand, holding: Holding, fault: str, kind: type[WnodesError]
) -> None:
    stand.fault(fault, boot_timeout_s=1 if fault == "never-boots" else 20)
    keep(stand, holding)
    assert holding.states == ["starting", "failed", "ending", "gone"]
    assert holding.error["kind"] == kind.__name__
    assert "console: " in holding.error["message"]


def test_a_bug_is_told_and_still_leaves_nothing(
    stand: Stand, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, channel: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(mounting.Mounts, "attach", fail)
    with pytest.raises(ZeroDivisionError):
        keep(stand, holding)
    assert holding.error == {"kind": "WnodesError", "message": "bug in the keeper: ZeroDivisionError: oops", "hint": ""}
    assert holding.states[-1] == "gone"


def test_a_vm_that_dies_while_the_job_runs_is_a_guest_panic(stand: Stand, holding: Holding) -> None:
    holding.on_state["running"] = lambda: os.kill(holding.told[-1]["vm_pid"], signal.SIGKILL)
    keep(stand, holding)
    assert holding.error["kind"] == "GuestPanic"
    assert "the VM ended while the job ran in it; its console ended with" in holding.error["message"]


def test_a_channel_that_breaks_under_a_living_vm_is_channel_lost(
    stand: Stand, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Keeper._serve

    async def cut(self: Keeper, running: Any) -> None:
        asyncio.get_running_loop().call_later(0.1, running.channel.fail, "guest channel: cut")
        await serve(self, running)

    monkeypatch.setattr(Keeper, "_serve", cut)
    keep(stand, holding)
    assert holding.error["kind"] == "ChannelLost"
    assert "while the job ran; its console ended with" in holding.error["message"]


def test_a_chatty_console_is_bounded(stand: Stand, holding: Holding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "CONSOLE_CHECK_S", 0.05)
    stand.plan = replace(stand.plan, console_kib=1)
    console = Path(stand.plan.console)
    sizes: list[int] = []

    def chat() -> None:
        with console.open("ab") as file:
            file.write(b"x" * 4096)
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, lambda: (sizes.append(console.stat().st_size), holding.end("enough")))

    holding.on_state["running"] = chat
    keep(stand, holding)
    assert sizes == [0]


def test_embedded_the_folder_goes_with_the_keeper(stand: Stand) -> None:
    # Our own parent is not the launcher: the lease is over as soon as it begins.
    keep(stand, None, launcher=os.getpid())
    assert not stand.folder.exists()
    (ended,) = history.read(stand.folder.parent / history.OF_USER)
    assert (ended["id"], ended["state"], ended["user"]) == (stand.plan.lease, "ended", "ann")
    assert [step[0] for step in ended["trace"]][-1:] == ["teardown"]
    assert (stand.folder.parent / history.OF_USER).stat().st_mode & 0o777 == 0o600


# What only a process of its own shows

MAIN = f"""
import sys
from wnodes_core import keeper
from wnodes_core.plugins import Plugins
Plugins.__init__.__kwdefaults__.update(builtins=({FAKE!r}, "lease_kit_disks"), scan=False)
sys.path.insert(0, sys.argv[1])
import lease_kit
disks = sys.modules["lease_kit_disks"] = lease_kit.Disks()
sys.exit(keeper.main())
"""

LAUNCHER = """
import os, subprocess, sys
keeper = subprocess.Popen([sys.executable, "-I", "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE)
keeper.stdin.write(sys.stdin.buffer.read().replace(b'"LAUNCHER"', str(os.getpid()).encode()))
keeper.stdin.close()
print(keeper.pid, flush=True)
keeper.wait()
"""


@pytest.fixture
def launched(stand: Stand) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A launcher and the pid of the keeper that it started, with a VM that runs."""
    argv = [sys.executable, "-I", "-c", LAUNCHER, MAIN, str(Path(__file__).parent)]
    launcher = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    plan = replace(stand.plan, trace=True).to_dict()
    trace = {"origin": time.monotonic() - 1, "steps": [["launcher", 0.0, 1.0]]}
    launcher.stdin.write(json.dumps({"plan": plan, "launcher": "LAUNCHER", "trace": trace}).encode())
    launcher.stdin.close()
    pid = int(launcher.stdout.readline())
    wait_for(lambda: state_of(stand) == "running")
    yield launcher, pid
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()


def wait_for(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def state_of(stand: Stand) -> str:
    try:
        return str(json.loads((stand.folder / "lease.json").read_text())["state"])
    except FileNotFoundError:
        return ""


def test_it_shrugs_off_a_batch_systems_signals_and_ends_with_its_launcher(
    stand: Stand, launched: tuple[subprocess.Popen[bytes], int]
) -> None:
    launcher, pid = launched
    for number in SHRUGGED_OFF:
        os.kill(pid, number)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Umask"] == "0077"
    ignored = int(status["SigIgn"], 16)
    assert all(ignored >> (number - 1) & 1 for number in SHRUGGED_OFF)
    assert os.readlink(f"/proc/{pid}/cwd") == str(stand.folder)
    assert state_of(stand) == "running"
    launcher.kill()
    wait_for(lambda: not stand.folder.exists())
    assert stand.processes() == []


def test_it_serves_until_its_last_launcher_has_gone(
    stand: Stand, launched: tuple[subprocess.Popen[bytes], int]
) -> None:
    script = (
        "import sys; from wnodes_core.guest import client;"
        "end = client.run(sys.argv[1], client.Command(['sh', '-c', 'echo hi; echo own >&2'], '/', {}),"
        " progress=client.show_progress);"
        "sys.exit(end.code)"
    )
    argv = [sys.executable, "-I", "-c", script, str(stand.folder / "keeper.sock")]
    done = subprocess.run(argv, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, b"hi\n"), done.stderr
    line, own = done.stderr.decode().splitlines()
    assert re.fullmatch(
        r"wnodes: cold start in [1-9]\.\d{3} s \(launcher 1\.00, .*boot \d\.\d\d.*\)", line
    ), line
    assert own == "own"
    wait_for(lambda: not stand.folder.exists())
    assert launched[0].wait(PATIENCE_S) == 0
