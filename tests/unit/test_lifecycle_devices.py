"""Mounts that are devices of the VM: who is asked for one, what the backend gets, what is undone."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Filesystem, Mount, Vm, hookimpl
from wnodes_core.backends import fake
from wnodes_core.errors import HostError, MountDenied
from wnodes_core.files import remove_tree
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.mounting import needs_device
from wnodes_core.plan import vm_from_dict

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import Stand  # noqa: E402


class Device:
    """A provider whose mounts are devices, unless it is told to fail."""

    wnodes_api = 1

    def __init__(self, name: str, problem: Exception | None = None, needs: str = "device") -> None:
        self.name, self.problem, self.needs = name, problem, needs
        self.told: list[Any] = []
        self.detached: list[str] = []

    @hookimpl
    def wnodes_mount_usable(self) -> dict[str, str]:
        return {"provider": self.name, "problem": "", "needs": self.needs}

    @hookimpl
    def wnodes_mount_equip(self, mount: Mount, index: int, folder: str, provider: str) -> dict[str, Any] | None:
        if provider != self.name:
            return None
        self.told.append("equip")
        if self.problem:
            raise self.problem
        device = {"kind": "virtiofs", "source": f"{folder}/fs{index}.sock", "tag": f"t{index}", "read_only": False}
        return {"provider": self.name, "process": None, "filesystem": device, "notice": f"equipped by {self.name}"}

    @hookimpl
    def wnodes_mount_attach(self, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
        if provider != self.name:
            return None
        self.told.append(guest["equipped"])
        return {"provider": self.name, "process": None, "guest": [], "notice": ""}

    @hookimpl
    def wnodes_mount_detach(self, attachment: dict[str, Any]) -> bool | None:
        if attachment["provider"] != self.name:
            return None
        self.detached.append("equipment" if "filesystem" in attachment else "attachment")
        return True


@pytest.fixture
def stand() -> Iterator[Stand]:
    """One mount, in a short private folder: names of sockets have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="wnl-"))
    stand = Stand(folder)
    stand.plan = replace(stand.plan, mounts=(Mount("/data", "/mnt/data"),))
    yield stand
    left = stand.left()
    fake.wnodes_vm_stop(vm=stand.plan.vm(()))
    remove_tree(folder)
    assert not left, "\n".join(left)


def _go(stand: Stand, order: tuple[str, ...], *providers: Device) -> list[Vm]:
    for provider in providers:
        stand.plugins.register(provider, provider.name)
    stand.plan = replace(stand.plan, storage=order)
    seen: list[Vm] = []

    async def use(lifecycle: Lifecycle, running: Running) -> None:
        seen.append(running.vm)

    assert stand.go(use) == []
    return seen


def test_the_first_providers_device_is_in_the_vm_and_undone_after_it(stand: Stand) -> None:
    first, second = Device("first"), Device("second")
    (vm,) = _go(stand, ("first", "second"), first, second)
    assert vm.filesystems == (Filesystem("virtiofs", f"{stand.folder}/fs0.sock", "t0"),)
    assert first.told[0] == "equip" and first.told[1]["filesystem"]["tag"] == "t0"
    assert second.told == []
    assert "equipped by first" in stand.said
    assert stand.lines() == [
        *("making attachment", "made attachment", "making disk", "made disk", "making vm", "made vm"),
        *("making attachment", "made attachment", "gone attachment", "gone vm", "gone disk", "gone attachment"),
    ]
    assert first.detached == ["attachment", "equipment"]


def test_a_sick_provider_is_passed_over(stand: Stand) -> None:
    sick, well = Device("sick", HostError("no such program")), Device("well")
    (vm,) = _go(stand, ("sick", "well"), sick, well)
    assert [each.tag for each in vm.filesystems] == ["t0"]
    assert well.told[0] == "equip"


def test_nobody_behind_one_that_needs_no_device_is_asked(stand: Stand) -> None:
    port, device = Device("port", needs=""), Device("device")
    (vm,) = _go(stand, ("port", "device"), port, device)
    assert vm.filesystems == ()
    assert (port.told, device.told) == ([None], [])


def test_a_start_that_is_given_up_leaves_no_device_behind_the_undo(stand: Stand) -> None:
    class Slow(Device):
        @hookimpl
        def wnodes_mount_equip(self, mount: Mount, index: int, folder: str, provider: str) -> dict[str, Any] | None:
            self.told.append("begun")
            time.sleep(0.3)
            self.told.append("made")
            return {"provider": self.name, "process": None, "filesystem": {}, "notice": ""}

    slow = Slow("slow")
    stand.plugins.register(slow, "slow")
    stand.plan = replace(stand.plan, storage=("slow",))
    journal = Journal(stand.folder / "journal")
    lifecycle = Lifecycle(stand.plan, journal, stand.plugins.hook, stand.trace, stand.said.append)

    async def give_up() -> None:
        start = asyncio.ensure_future(lifecycle.start())
        while not slow.told:
            await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert lifecycle.stop() == []  # as a keeper does, while its loop still runs

    asyncio.run(give_up())
    journal.close()
    assert (slow.told, slow.detached) == (["begun", "made"], ["equipment"])
    assert stand.lines() == ["making attachment", "made attachment", "gone attachment"]


def test_a_denied_source_ends_the_start_before_there_is_anything(stand: Stand) -> None:
    with pytest.raises(MountDenied, match="not yours"):
        _go(stand, ("x",), Device("x", MountDenied("not yours")))
    assert stand.lines() == ["making attachment", "gone attachment"]


def test_a_vm_with_devices_comes_back_from_the_journal(stand: Stand) -> None:
    vm = replace(stand.plan.vm(()), filesystems=(Filesystem("9p", "/data", "t0", True),))
    assert vm_from_dict(asdict(vm)) == vm


def test_only_mounts_whose_first_provider_needs_a_device_keep_a_vm_from_being_a_clone(stand: Stand) -> None:
    for provider in (Device("device"), Device("port", needs="")):
        stand.plugins.register(provider, provider.name)
    hook, mounts = stand.plugins.hook, stand.plan.mounts
    assert needs_device(hook, ("device", "port"), mounts)
    assert not needs_device(hook, ("port", "device"), mounts)
    assert not needs_device(hook, ("unknown",), mounts)
    assert not needs_device(hook, ("device",), ())
