"""Both backends keep the same contract."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Boot, Process, Template, Vm
from wnodes_core.backends import fake
from wnodes_core.errors import BootTimeout, ChannelLost, NoKvm, TransientError
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.testing.backend import BackendContract
from wnodes_core.testing.template import TemplateContract
from wnodes_core.tools import table


class TestFake(BackendContract):
    backend = "wnodes_core.backends.fake"

    def test_the_real_agent_answers(self, vm: Vm) -> None:
        assert answer(vm) == os.uname().release

    def test_a_slow_guest_answers_later(self, vm: Vm) -> None:
        began = time.monotonic()
        assert answer(faulty(vm, "slow")) == os.uname().release
        assert time.monotonic() - began > 1

    def test_a_panic_ends_the_vm_and_is_on_the_console(self, vm: Vm) -> None:
        with pytest.raises((ChannelLost, BootTimeout)):  # the latter where it has died before we connect
            answer(faulty(vm, "panics"), timeout_s=3)
        assert "Kernel panic" in Path(vm.console).read_text()
        deadline = time.monotonic() + 5
        while any(each["name"] == vm.name for each in fake.wnodes_vm_list()):
            assert time.monotonic() < deadline, "the VM outlived its guest's panic"

    def test_a_guest_that_never_boots(self, vm: Vm) -> None:
        with pytest.raises(BootTimeout):
            answer(faulty(vm, "never-boots"), timeout_s=0.5)

    def test_a_qemu_that_dies_as_it_starts(self, vm: Vm) -> None:
        with pytest.raises(TransientError, match="ended as it started"):
            fake.wnodes_vm_start(vm=faulty(vm, "dies"))

    def test_there_is_no_kvm(self, tmp_path: Path) -> None:
        assert fake.wnodes_vm_probe("auto", str(tmp_path))["accel"] == "tcg"
        with pytest.raises(NoKvm):
            fake.wnodes_vm_probe("kvm", str(tmp_path))

    def test_stop_leaves_no_process_of_the_guest(self, vm: Vm) -> None:
        for _ in range(5):
            fake.wnodes_vm_start(vm=vm)
            assert fake.wnodes_vm_stop(vm=vm)
            assert not family_of(vm.name)
            for channel in vm.channels:
                os.unlink(channel.path)


def faulty(vm: Vm, fault: str) -> Vm:
    return replace(vm, boot=Boot("/vmlinuz", "", f"quiet fault={fault}"))


def answer(vm: Vm, timeout_s: float = 10) -> str:
    """The kernel release that the guest's agent tells."""
    fake.wnodes_vm_start(vm=vm)

    async def ask() -> str:
        channel = await GuestChannel.connect(vm.channels[0].path, timeout_s=timeout_s)
        try:
            return str(channel.facts["kernel"])
        finally:
            channel.close()

    return asyncio.run(ask())


def family_of(name: str) -> list[Process]:
    return [each for each in table() if name in each.command and each.pid != os.getpid()]


@pytest.mark.guest
class TestLibvirt(BackendContract):
    backend = "wnodes_core.backends.libvirt.plugin"

    @pytest.fixture
    def vm(self, lease_folder: Path, hooks: Any) -> Iterator[Vm]:
        vm = self.make_vm(lease_folder)
        yield vm
        assert hooks.wnodes_vm_stop(vm=vm)


class TestFakeTemplates(TemplateContract):
    backend = "wnodes_core.backends.fake"
    way = "mapped"

    def test_a_clone_that_dies_leaves_nothing(self, vm: Vm, template: Template) -> None:
        error = self.refused(faulty(vm, "clone-dies"), template)
        assert isinstance(error, TransientError)

    @pytest.mark.parametrize(("fault", "error"), [("clone-silent", BootTimeout), ("clone-garbage", ChannelLost)])
    def test_a_clone_that_does_not_wake(
        self, vm: Vm, template: Template, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception]
    ) -> None:
        async def wake() -> None:
            async with self.woken(faulty(vm, fault), template):
                pass

        monkeypatch.setattr(TestFakeTemplates, "answer_s", 3.0)
        with pytest.raises(error):
            asyncio.run(wake())

    def test_faults_of_clones_do_not_trouble_a_boot(self, tmp_path: Path) -> None:
        vm = self.make_vm(tmp_path)
        assert answer(faulty(vm, "clone-dies")) == os.uname().release
        assert fake.wnodes_vm_stop(vm=vm)
