"""What the tests of ``TemplateContract`` stand on: a template, clones that answer, templates that are damaged."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Channel, Process, Template, Vm, errors
from wnodes_core.guest import identity
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.tools import private_folder, run, spawn

_PIPE = -1  # subprocess.PIPE
AGENT, MOUNTS = "org.wnodes.agent.0", ("org.wnodes.mount.0", "org.wnodes.mount.1")


class TemplateStage:
    """A template, and clones of it that other processes start."""

    backend = ""
    way = ""
    answer_s = 15.0
    refused_s = 15.0

    @pytest.fixture
    def hooks(self) -> Any:
        """The module under test."""
        return importlib.import_module(self.backend)

    @pytest.fixture(scope="class")
    @classmethod
    def template(cls, tmp_path_factory: pytest.TempPathFactory) -> Template:
        """A template, built once for the whole class by a process that has ended since."""
        folder = private_folder(tmp_path_factory.mktemp("t") / f"t-{os.urandom(4).hex()}")
        builder = cls._helper("build", cls.way, asdict(cls.make_vm(folder)))
        told = _said(builder)
        builder.stdin.close()
        builder.stdout.close()
        assert builder.wait(10) == 0
        assert "folder" in told, told
        return Template.from_dict(told)

    @pytest.fixture
    def vm(self, tmp_path: Path, template: Template, hooks: Any) -> Iterator[Vm]:
        """What a clone is to be; ended after the test, whatever the test did."""
        vm = self.make_clone(template, private_folder(tmp_path / "c"))
        yield vm
        assert hooks.wnodes_vm_stop(vm=vm)

    @classmethod
    def make_vm(cls, folder: Path) -> Vm:
        """The smallest VM that the backend boots, with an agent's port and two for mounts."""
        return Vm(
            name=f"wnodes-{folder.name}",
            folder=str(folder),
            cpus=1,
            memory_mib=64,
            accel="tcg",
            disks=(),
            channels=tuple(Channel(name, f"{folder}/{name[11:]}") for name in (AGENT, *MOUNTS)),
            console=f"{folder}/console.log",
        )

    @classmethod
    def make_clone(cls, template: Template, folder: Path) -> Vm:
        """A clone in a folder of its own, named as its folder's lease would be; its second mount port is idle."""
        vm = cls.make_vm(folder)
        lease = private_folder(folder / f"c-{os.urandom(4).hex()}")
        channels = (
            Channel(AGENT, f"{lease}/a"),
            Channel(MOUNTS[0], f"{lease}/m"),
            Channel(MOUNTS[1], ""),
        )
        return replace(
            vm,
            name=f"wnodes-{lease.name}",
            folder=str(lease),
            channels=channels,
            console=f"{lease}/console.log",
            memory_mib=template.shape.memory_mib,
            most_mib=template.shape.most_mib,
        )

    @asynccontextmanager
    async def woken(self, vm: Vm, template: Template) -> AsyncIterator[tuple[Any, Process, GuestChannel]]:
        """A clone that answers: the process that started it, its own, its channel. The starter ends with the block."""
        wake = identity.ask(vm.name[:40])
        waiting = asyncio.ensure_future(
            GuestChannel.resume(vm.channels[0].path, timeout_s=self.answer_s, wake=wake)
        )
        await asyncio.sleep(0)
        starter, told = await asyncio.to_thread(self._cloned, vm, template)
        try:
            assert "pid" in told, told
            channel, said = await waiting
            identity.check(template.identity, wake, said)
            yield starter, Process(**{**told, "command": ()}), channel
            channel.close()
        finally:
            waiting.cancel()
            _end(starter)

    def refused(self, vm: Vm, template: Template) -> errors.WnodesError:
        """The error with which this clone is refused; asserts that it came soon."""
        began = time.monotonic()
        starter, told = self._cloned(vm, template)
        _end(starter)
        assert "pid" not in told, "it was cloned"
        assert time.monotonic() - began < self.refused_s
        return errors.from_dict(told)

    def _cloned(self, vm: Vm, template: Template) -> tuple[Any, dict[str, Any]]:
        starter = self._helper("clone", asdict(vm), asdict(template))
        return starter, _said(starter)

    @classmethod
    def _helper(cls, *words: Any) -> Any:
        argv = [sys.executable, "-m", "wnodes_core.testing.template_helper", cls.backend, json.dumps(words)]
        return spawn(argv, stdin=_PIPE, stdout=_PIPE, stderr=2)


def digests(template: Template) -> dict[str, str]:
    """SHA-256 of each file of the template, its disks included."""
    paths = [*files(template), *(Path(disk.path) for disk in template.disks)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def files(template: Template) -> list[Path]:
    """What the backend wrote."""
    memory = [Path(template.memory)] if template.memory else []
    return [*(Path(template.folder, name) for name in template.files.values()), *memory]


def copied(template: Template, folder: Path, *, altered: str = "") -> Template:
    """The same template in another folder, of whose files one may be altered; its disks stay where they are."""
    private_folder(folder)
    for path in files(template):
        if path.name == altered:
            run(["cp", "--sparse=auto", str(path), str(folder)])
        else:
            os.link(path, folder / path.name)
    memory = str(folder / Path(template.memory).name) if template.memory else ""
    return replace(template, folder=str(folder), memory=memory)


def damage(path: Path, how: str) -> None:
    """Make a file ``absent``, ``empty`` or ``cut`` in half."""
    if how == "absent":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "cut" else 0)


def _said(helper: Any) -> dict[str, Any]:
    line = helper.stdout.readline()
    assert line, f"the helper ended with {helper.wait(10)}"
    told: dict[str, Any] = json.loads(line)
    return told


def tell(starter: Any, word: str) -> bool:
    """Order a starter to ``pause``, ``resume`` or ``fit`` its clone: what the hook returned."""
    starter.stdin.write(word.encode() + b"\n")
    starter.stdin.flush()
    return bool(starter.stdout.readline() == b"True\n")


def _end(starter: Any) -> None:
    starter.kill()
    starter.wait(10)
    for pipe in (starter.stdin, starter.stdout):
        pipe.close()
