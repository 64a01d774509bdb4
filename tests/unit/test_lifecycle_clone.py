"""A lease whose plan names a template, with the fake backend and the real agent: clone, or boot instead."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import lifecycle as lifecycle_module
from wnodes_core import mounting
from wnodes_core.api import hookimpl
from wnodes_core.backends import fake
from wnodes_core.errors import ImageError, NoProvider, RequestError
from wnodes_core.files import remove_tree
from wnodes_core.guest import identity
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.model import Disk, Mount, Template, Trace
from wnodes_core.plan import Plan
from wnodes_core.templates import build

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import Stand  # noqa: E402


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    """A template that the builder's own code made of a fake guest."""
    folder = Path(tempfile.mkdtemp(prefix="wnt-"))
    stand = Stand(folder)
    plan = replace(stand.plan, mount_ports=2)
    journal = Journal(folder / "journal")
    made = Lifecycle(plan, journal, stand.plugins.hook, Trace(), print)
    blank = build.disks.blank_for
    build.disks.blank_for = lambda _disk, path: Path(path).touch()  # type: ignore[assignment]
    try:
        yield asyncio.run(build.build(made, "t", "mapped"))
    finally:
        build.disks.blank_for = blank
        made.stop()
        shutil.rmtree(folder)


@pytest.fixture
def stand(template: Template) -> Iterator[Stand]:
    folder = Path(tempfile.mkdtemp(prefix="wnl-"))
    stand = Stand(folder)
    stand.plan = replace(stand.plan, template=template)
    yield stand
    left = stand.left()
    fake.wnodes_vm_stop(vm=stand.plan.vm(()))
    remove_tree(folder)
    assert not left, "\n".join(left)


def phases(stand: Stand) -> list[str]:
    return [step.name for step in stand.trace.steps]


def works(stand: Stand) -> None:
    """The lease comes up, runs a command, and goes."""

    async def use(_: Lifecycle, running: Running) -> None:
        assert (await running.channel.run(["echo", "hi"])).stdout == b"hi\n"

    assert stand.go(use) == []


def test_a_clone_has_the_journal_of_any_vm_and_is_told_in_the_trace(stand: Stand) -> None:
    stand.mount(count=2)
    works(stand)
    up = ["disk", "vm", "attachment", "attachment"]
    assert sorted(stand.lines()) == sorted(f"{op} {kind}" for kind in up for op in ("making", "made", "gone"))
    assert phases(stand)[:5] == ["overlay", "clone", "wake", "agent", "mount"]
    assert (stand.trace.start.kind, stand.trace.start.template, stand.trace.start.fallback) == ("warm", "t", "")
    assert stand.said == []


@pytest.mark.parametrize(
    ("fault", "kind"), [("clone-dies", "TransientError"), ("clone-silent", "BootTimeout"), ("clone-garbage", "ChannelLost")]
)
def test_whatever_a_clone_does_wrong_the_job_is_booted_once(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, fault: str, kind: str
) -> None:
    monkeypatch.setattr(lifecycle_module, "CLONE_TIMEOUT_S", 2.0)
    stand.fault(fault)
    works(stand)
    assert "boot" in phases(stand)
    assert (stand.trace.start.kind, stand.trace.start.fallback) == ("cold", kind)
    assert stand.said[0].startswith("no clone: ") and stand.said[0].endswith("; booting instead")
    assert stand.lines().count("making vm") == 2 == stand.lines().count("gone vm")


Lie = Callable[[dict[str, Any], Template], None]
LIES: dict[str, Lie] = {
    "the template's boot id": lambda told, template: told["identity"].update(boot_id=template.identity["boot_id"]),
    "the template's random number": lambda told, template: told["identity"].update(random=template.identity["random"]),
    "another host name": lambda told, template: told["identity"].update(host_name="other"),
    "no identity": lambda told, template: told.pop("identity"),
    "a clock an hour ahead": lambda told, template: told.update(clock=told["clock"] + 3600),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_double_never_sees_the_job(
    stand: Stand, template: Template, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real = identity.check

    def check(of_template: Any, asked: Any, told: Any, *rest: Any) -> Any:
        LIES[lie](told, template)
        return real(of_template, asked, told, *rest)

    monkeypatch.setattr(identity, "check", check)
    works(stand)
    assert stand.trace.start.fallback == "IdentityError"
    assert phases(stand).index("boot") < phases(stand).index("agent")


def test_a_mistake_of_the_requests_is_none_of_the_clones(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Lifecycle, channel: Any) -> None:
        raise RequestError("no such folder")

    monkeypatch.setattr(Lifecycle, "_set_up", refuse)
    with pytest.raises(RequestError):
        stand.go()
    assert "boot" not in phases(stand)


def test_a_template_that_went_meanwhile_is_no_clone(stand: Stand, template: Template) -> None:
    stand.plan = replace(stand.plan, template=replace(template, folder="/gone", memory="/gone/memory"))
    works(stand)
    assert stand.trace.start.kind == "cold" and stand.trace.start.fallback


class Scratch:
    """Scratch disks that are plain files; ``plugs`` is what the backend says of plugging one in."""

    wnodes_api = 1

    def __init__(self, plugs: bool = True) -> None:
        self.plugs = plugs

    @hookimpl
    def wnodes_disk_plug(self, vm: Any, disk: Disk, fd: int) -> bool | None:
        return None if self.plugs else False


def test_a_clone_is_given_its_scratch_once_it_answers(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "SHOW_SCRATCH", "true")
    file = stand.folder / "scratch.raw"
    stand.plan = replace(stand.plan, scratch=Disk(str(file), "raw", serial="scratch", size_mib=4))
    assert Plan.from_dict(json.loads(json.dumps(stand.plan.to_dict()))) == stand.plan

    async def use(_: Lifecycle, running: Running) -> None:
        told = json.loads((stand.folder / "disk.json").read_text())
        assert told == {"serial": "scratch", "inode": file.stat().st_ino}

    assert stand.go(use) == []
    assert stand.trace.start.kind == "warm"
    assert phases(stand)[:6] == ["overlay", "clone", "wake", "agent", "scratch", "mount"]
    lines = stand.lines()
    assert lines[4:6] == ["making disk", "made disk"] and lines[-3:] == ["gone disk", "gone vm", "gone disk"]
    assert not file.exists()


def test_a_backend_that_plugs_no_disk_boots_with_it(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "SHOW_SCRATCH", "true")
    stand.plugins.register(Scratch(plugs=False), "no-plug")
    file = stand.folder / "scratch.raw"
    stand.plan = replace(stand.plan, scratch=Disk(str(file), "raw", serial="scratch", size_mib=4))
    works(stand)
    assert (stand.trace.start.kind, stand.trace.start.fallback) == ("cold", "NoProvider")
    assert not (stand.folder / "disk.json").exists() and not file.exists()


def test_a_guest_that_shows_no_scratch_is_booted_with_it(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(mounting, "SHOW_SCRATCH", "exit 1")
    stand.plan = replace(stand.plan, scratch=Disk(f"{stand.folder}/scratch.raw", "raw", serial="scratch", size_mib=4))
    with pytest.raises(ImageError, match="scratch"):
        stand.go(lambda lifecycle, _: kinds.append(lifecycle.trace.start.kind))
    assert stand.trace.start.kind == "cold" and not kinds and stand.errors == []


class Plugged:
    """A provider whose mounts are plugged in; ``plugs`` is what the backend says of it."""

    wnodes_api = 1

    def __init__(self, plugs: bool = True) -> None:
        self.plugs = plugs
        self.memory: list[bytes | None] = []
        self.shown: list[Any] = []

    @hookimpl
    def wnodes_mount_usable(self) -> dict[str, str]:
        return {"provider": "plugged", "problem": "", "needs": "plug"}

    @hookimpl
    def wnodes_mount_equip(
        self, index: int, folder: str, provider: str, memory: int | None
    ) -> dict[str, Any] | None:
        if provider != "plugged":
            return None
        self.memory.append(None if memory is None else os.readlink(f"/proc/self/fd/{memory}").encode())
        device = {"kind": "virtiofs", "source": f"{folder}/fs{index}.sock", "tag": f"t{index}", "read_only": False}
        return {"provider": "plugged", "process": None, "filesystem": device, "notice": ""}

    @hookimpl
    def wnodes_filesystems_plug(self) -> bool | None:
        return None if self.plugs else False

    @hookimpl
    def wnodes_mount_attach(self, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
        if provider != "plugged":
            return None
        if not guest["equipped"]:
            raise NoProvider("no device")
        self.shown.append(guest["equipped"]["filesystem"]["tag"])
        return {"provider": "plugged", "process": None, "guest": [], "notice": ""}

    @hookimpl
    def wnodes_mount_detach(self, attachment: dict[str, Any]) -> bool | None:
        return True if attachment["provider"] == "plugged" else None


def with_plugged(stand: Stand, provider: Plugged) -> None:
    stand.plugins.register(provider, "plugged")
    mounts = (Mount("/data", "/mnt/a"), Mount("/data", "/mnt/b"))
    stand.plan = replace(stand.plan, mounts=mounts, storage=("plugged",))


def test_a_clones_mounts_are_plugged_in_at_once_by_who_sees_its_memory(stand: Stand) -> None:
    provider = Plugged()
    with_plugged(stand, provider)

    async def use(_: Lifecycle, running: Running) -> None:
        told = json.loads((stand.folder / "filesystems.json").read_text())
        assert [each["tag"] for each in told] == ["t0", "t1"]
        assert provider.memory == [f"/proc/{running.process.pid}/mem".encode()] * 2
        assert f"/proc/{running.process.pid}/mem" not in map(_link, os.listdir("/proc/self/fd")), "it stays open"

    assert stand.go(use) == []
    assert stand.trace.start.kind == "warm"
    assert phases(stand)[:6] == ["overlay", "clone", "wake", "plug", "agent", "mount"]
    assert sorted(provider.shown) == ["t0", "t1"]
    lines = stand.lines()
    assert lines[2:8] == ["making vm", "made vm", *["making attachment", "made attachment"] * 2]
    assert lines.count("gone attachment") == 4


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_where_nothing_can_be_plugged_in_the_vm_is_booted_with_it(stand: Stand) -> None:
    provider = Plugged(plugs=False)
    with_plugged(stand, provider)
    works(stand)
    assert (stand.trace.start.kind, stand.trace.start.fallback) == ("cold", "NoProvider")
    assert provider.memory == [None, None], "no gateway for a clone that takes none; a VM that is booted shares its memory"
    assert not (stand.folder / "filesystems.json").exists()
