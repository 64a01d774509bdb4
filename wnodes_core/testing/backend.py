"""What every hypervisor backend must do, as tests that its author inherits.

::

    class TestMine(BackendContract):
        backend = "my_package.plugin"

Override ``vm`` to start something lighter or richer than an empty machine.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Boot, Channel, Disk, Process, Vm, errors
from wnodes_core.tools import alive, kill, open_pidfd, spawn

_PIPE = -1  # subprocess.PIPE
_ENDS_WITHIN_MS = 10_000


class BackendContract:
    """Start, find, pause and stop a VM, from this process and from others."""

    backend = ""

    @pytest.fixture
    def hooks(self) -> Any:
        """The module under test."""
        return importlib.import_module(self.backend)

    @pytest.fixture
    def vm(self, tmp_path: Path, hooks: Any) -> Iterator[Vm]:
        """A VM of its own name; ended after the test, whatever the test did."""
        vm = self.make_vm(tmp_path)
        yield vm
        assert hooks.wnodes_vm_stop(vm=vm)

    def make_vm(self, folder: Path) -> Vm:
        """The smallest VM that the backend starts."""
        return Vm(
            name=f"contract-{os.getpid()}-{os.urandom(4).hex()}",
            folder=str(folder),
            cpus=1,
            memory_mib=64,
            accel="tcg",
            disks=(),
            channels=(
                Channel("org.wnodes.agent.0", f"{folder}/a.sock"),
                Channel("org.wnodes.mount.0", f"{folder}/m.sock"),
            ),
            console=f"{folder}/console.log",
        )

    def start_elsewhere(self, vm: Vm) -> tuple[Any, Process]:
        """Start ``vm`` in another process, which then waits: its Popen and the VM's process."""
        argv = [sys.executable, "-m", "wnodes_core.testing.backend", self.backend, json.dumps(asdict(vm))]
        starter = spawn(argv, stdin=_PIPE, stdout=_PIPE, stderr=2)
        assert starter.stdout is not None
        line = starter.stdout.readline()
        assert line, f"the starter ended with {starter.wait(10)}"
        told = json.loads(line)
        assert "pid" in told, told
        return starter, Process(**{**told, "command": ()})

    def test_start_gives_the_hypervisors_process(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            assert alive(process)
            assert process.uid == os.getuid()
            assert process.pid != starter.pid

    def test_sockets_exist_on_return(self, hooks: Any, vm: Vm) -> None:
        starter, _ = self.start_elsewhere(vm)
        with _ended(starter):
            for channel in vm.channels:
                with socket.socket(socket.AF_UNIX) as host:
                    host.connect(channel.path)

    def test_start_again_gives_the_same_process(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        again, same = self.start_elsewhere(vm)
        with _ended(starter), _ended(again):
            assert (same.pid, same.started) == (process.pid, process.started)

    def test_stop_ends_it_and_may_be_repeated(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            assert hooks.wnodes_vm_stop(vm=vm)
            assert not alive(process)
            assert hooks.wnodes_vm_stop(vm=vm)

    def test_stop_of_what_never_started(self, hooks: Any, vm: Vm) -> None:
        assert hooks.wnodes_vm_stop(vm=vm)

    def test_vm_outlives_a_killed_starter_and_is_stopped_by_another(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            starter.kill()
            starter.wait(10)
        assert alive(process)
        assert hooks.wnodes_vm_stop(vm=vm)
        assert not alive(process)

    def test_stop_spares_a_vm_whose_name_begins_alike(self, hooks: Any, vm: Vm, tmp_path: Path) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            assert hooks.wnodes_vm_stop(vm=replace(vm, name=vm.name[:-1]))
            assert hooks.wnodes_vm_stop(vm=replace(vm, name=vm.name + "0"))
            assert alive(process)

    def test_list_names_it_while_it_lives(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            facts = {"name": vm.name, "pid": process.pid, "uid": os.getuid(), "started": process.started}
            assert facts in hooks.wnodes_vm_list()
            hooks.wnodes_vm_stop(vm=vm)
            assert facts not in hooks.wnodes_vm_list()

    def test_the_batch_systems_signals_do_not_end_it(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                os.kill(process.pid, number)
            with socket.socket(socket.AF_UNIX) as host:
                host.connect(vm.channels[0].path)
            assert alive(process)

    def test_its_death_is_seen_on_the_returned_process(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            fd = open_pidfd(process)
            assert fd is not None
            assert kill(process)
            assert _readable(fd)
            os.close(fd)

    def test_pause_and_resume(self, hooks: Any, vm: Vm) -> None:
        starter, process = self.start_elsewhere(vm)
        with _ended(starter):
            for word in (b"pause\n", b"resume\n"):
                starter.stdin.write(word)
                starter.stdin.flush()
                assert starter.stdout.readline() == b"True\n"
            assert alive(process)

    def test_a_missing_disk_is_no_verdict_on_the_host(self, hooks: Any, vm: Vm, tmp_path: Path) -> None:
        broken = replace(vm, disks=(Disk(str(tmp_path / "absent.qcow2"), "qcow2"),))
        argv = [sys.executable, "-m", "wnodes_core.testing.backend", self.backend, json.dumps(asdict(broken))]
        starter = spawn(argv, stdin=_PIPE, stdout=_PIPE)
        with _ended(starter):
            assert starter.stdout is not None
            told = json.loads(starter.stdout.readline())
        error = errors.from_dict(told)
        assert isinstance(error, errors.TransientError)
        assert "absent.qcow2" in str(error)
        assert not [each for each in hooks.wnodes_vm_list() if each["name"] == vm.name]


class _ended:
    """Close a starter's pipes and reap it at the end of a ``with`` block."""

    def __init__(self, starter: Any) -> None:
        self.starter = starter

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        self.starter.kill()
        self.starter.wait(10)
        for pipe in (self.starter.stdin, self.starter.stdout):
            pipe.close()


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(_ENDS_WITHIN_MS))


def _vm_from(text: str) -> Vm:
    data = json.loads(text)
    channels = tuple(Channel(**channel) for channel in data["channels"])
    disks = tuple(Disk(**disk) for disk in data["disks"])
    boot = Boot(**data["boot"]) if data["boot"] else None
    return Vm(**{**data, "boot": boot, "channels": channels, "disks": disks, "cpuset": tuple(data["cpuset"])})


def starter(backend: str, vm: Vm) -> int:
    """Start ``vm``, print its process (or the error), then obey ``pause`` and ``resume`` on stdin."""
    hooks = importlib.import_module(backend)
    try:
        facts = asdict(hooks.wnodes_vm_start(vm=vm))
    except errors.WnodesError as error:
        facts = error.to_dict()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(hooks.wnodes_vm_pause(vm=vm, paused=line.strip() == "pause"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(starter(sys.argv[1], _vm_from(sys.argv[2])))
