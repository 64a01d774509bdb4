"""What every backend must do that saves booted guests and clones them, as tests that its author inherits.

::

    class TestMine(TemplateContract):
        backend = "my_package.plugin"
        way = "mine"

Override ``make_vm`` to boot something richer than an empty machine, and ``make_clone`` to give its clones
the disks that belong to that. The guest must have our agent's bootstrap: the suite brings it to rest
and wakes it, as wnodes does.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Template, Vm
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.testing.template_stage import TemplateStage, copied, damage, digests, files, tell
from wnodes_core.tools import alive, kill, open_pidfd


class TemplateContract(TemplateStage):
    """Save a guest at rest; clone it, wake the clones, pause and stop them, from this process and from others."""

    # what is saved

    def test_the_way_is_offered(self, hooks: Any) -> None:
        assert self.way in hooks.wnodes_template_ways(accel="tcg")

    def test_the_host_is_told_alike_each_time(self, hooks: Any) -> None:
        told = hooks.wnodes_template_host(accel="tcg")
        assert told
        assert hooks.wnodes_template_host(accel="tcg") == told

    def test_another_backends_way_is_left_to_it(self, hooks: Any, vm: Vm, template: Template) -> None:
        assert hooks.wnodes_template_start(vm=vm, way="absent") is None
        assert hooks.wnodes_template_save(vm=vm, way="absent") is None
        assert hooks.wnodes_vm_clone(vm=vm, template=replace(template, way="absent")) is None

    def test_all_files_lie_in_the_templates_folder_and_no_process_is_left(self, hooks: Any, template: Template) -> None:
        assert template.files
        for path in files(template):
            assert path.stat().st_size, path
            assert path.is_relative_to(template.folder)
        assert not [each for each in hooks.wnodes_vm_list() if each["name"] == f"wnodes-{Path(template.folder).name}"]

    # what is cloned

    def test_two_clones_live_at_once_and_leave_the_template_as_it_was(
        self, hooks: Any, vm: Vm, template: Template, tmp_path: Path
    ) -> None:
        before = digests(template)
        other = self.make_clone(template, tmp_path / "c")

        async def both() -> None:
            async with self.woken(vm, template) as one, self.woken(other, template) as two:
                assert one[1].pid != two[1].pid
                for _ in range(2):
                    await asyncio.gather(*(each[2].request("ping", timeout_s=self.answer_s) for each in (one, two)))
                await self.apart(one[2], two[2])

        asyncio.run(both())
        assert hooks.wnodes_vm_stop(vm=other)
        assert digests(template) == before

    async def apart(self, one: GuestChannel, two: GuestChannel) -> None:
        """Prove more of what two clones do not share; for backends whose guest has a disk and programs."""

    def test_mount_ports_listen_where_they_have_a_path(self, vm: Vm, template: Template) -> None:
        async def connect() -> None:
            async with self.woken(vm, template):
                _, writer = await asyncio.open_unix_connection(vm.channels[1].path)
                writer.close()
                await writer.wait_closed()

        asyncio.run(connect())

    def test_it_is_listed_and_stopped_from_another_process(self, hooks: Any, vm: Vm, template: Template) -> None:
        async def stop() -> None:
            async with self.woken(vm, template) as (_, process, channel):
                facts = {"name": vm.name, "pid": process.pid, "uid": os.getuid(), "started": process.started}
                assert facts in hooks.wnodes_vm_list()
                assert await asyncio.to_thread(hooks.wnodes_vm_stop, vm=vm)
                assert not alive(process)
                assert facts not in hooks.wnodes_vm_list()
                await asyncio.wait_for(channel.lost, self.answer_s)

        asyncio.run(stop())
        assert hooks.wnodes_vm_stop(vm=vm)

    def test_it_outlives_a_killed_starter(self, hooks: Any, vm: Vm, template: Template) -> None:
        async def kill_starter() -> None:
            async with self.woken(vm, template) as (starter, process, channel):
                starter.kill()
                starter.wait(10)
                await channel.request("ping", timeout_s=self.answer_s)
                assert alive(process)
                assert await asyncio.to_thread(hooks.wnodes_vm_stop, vm=vm)
                assert not alive(process)

        asyncio.run(kill_starter())

    def test_the_batch_systems_signals_do_not_end_it(self, vm: Vm, template: Template) -> None:
        async def send() -> None:
            async with self.woken(vm, template) as (_, process, channel):
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                    os.kill(process.pid, number)
                await channel.request("ping", timeout_s=self.answer_s)

        asyncio.run(send())

    def test_its_death_is_seen_on_the_returned_process(self, vm: Vm, template: Template) -> None:
        async def die() -> None:
            async with self.woken(vm, template) as (_, process, channel):
                fd = open_pidfd(process)
                assert fd is not None
                assert kill(process)
                os.close(fd)
                await asyncio.wait_for(channel.lost, self.answer_s)

        asyncio.run(die())

    def test_a_paused_clone_is_silent_until_it_is_resumed(self, vm: Vm, template: Template) -> None:
        async def pause() -> None:
            async with self.woken(vm, template) as (starter, _, channel):
                assert await asyncio.to_thread(tell, starter, "pause")
                asking = asyncio.ensure_future(channel.request("ping", timeout_s=self.answer_s))
                await asyncio.sleep(0.5)
                assert not asking.done()
                assert await asyncio.to_thread(tell, starter, "resume")
                await asking

        asyncio.run(pause())

    def test_a_clone_that_stands_still_is_fitted_to_a_job_or_its_way_has_no_pool(
        self, hooks: Any, vm: Vm, template: Template
    ) -> None:
        """``wnodes_vm_fit`` works in the process that cloned."""

        async def fit() -> None:
            async with self.woken(vm, template) as (starter, _, channel):
                assert await asyncio.to_thread(tell, starter, "pause")
                assert await asyncio.to_thread(tell, starter, "fit") == (template.way == "mapped")
                assert await asyncio.to_thread(tell, starter, "resume")
                await channel.request("ping", timeout_s=self.answer_s)

        asyncio.run(fit())

    # what cannot be cloned

    @pytest.mark.parametrize("how", ["absent", "empty", "cut"])
    def test_no_clone_of_a_damaged_template(
        self, hooks: Any, vm: Vm, template: Template, tmp_path: Path, how: str
    ) -> None:
        for path in files(template):
            broken = copied(template, tmp_path / f"{how}-{path.name}", altered=path.name)
            damage(Path(broken.folder, path.name), how)
            assert self.refused(vm, broken).message, path
            assert not [each for each in hooks.wnodes_vm_list() if each["name"] == vm.name], path

    def test_no_clone_of_garbage(self, hooks: Any, vm: Vm, template: Template, tmp_path: Path) -> None:
        for name in template.files.values():  # of memory nobody can tell
            broken = copied(template, tmp_path / f"garbage-{name}", altered=name)
            path = Path(broken.folder, name)
            path.write_bytes(os.urandom(path.stat().st_size))
            assert self.refused(vm, broken).message, name
            assert not [each for each in hooks.wnodes_vm_list() if each["name"] == vm.name], name

    def test_a_template_that_is_gone(self, vm: Vm, template: Template, tmp_path: Path) -> None:
        mine = copied(template, tmp_path / "gone")

        async def live_on() -> None:
            async with self.woken(vm, mine) as (_, process, channel):
                shutil.rmtree(mine.folder)
                await channel.request("ping", timeout_s=self.answer_s)
                assert alive(process)

        asyncio.run(live_on())
        other = self.make_clone(template, tmp_path / "c")
        assert "gone" in str(self.refused(other, mine))
