"""Real guests through the libvirt backend: they boot, they panic, they keep to their CPUs."""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from wnodes_core.api import Boot, Channel, Disk, Process, Vm
from wnodes_core.backends.libvirt import plugin, probe
from wnodes_core.backends.libvirt.console import boot_failure
from wnodes_core.testing.backend import BackendContract
from wnodes_core.tools import alive, open_pidfd, run, spawn, table

IMAGE = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"), "images/minimal")
BOOT_S = 90
pytestmark = pytest.mark.guest


class Contract(BackendContract):
    __test__ = False
    backend = "wnodes_core.backends.libvirt.plugin"


@pytest.fixture
def vm(lease_folder: Path) -> Iterator[Vm]:
    """The small Debian guest that scripts/build-image makes."""
    assert (IMAGE / "disk.qcow2").exists(), f"{IMAGE}: no image, run scripts/build-image {IMAGE} --kind minimal"
    overlay, base = lease_folder / "overlay.qcow2", IMAGE / "disk.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(overlay)])
    vm = replace(
        Contract().make_vm(lease_folder),
        memory_mib=384,
        disks=(Disk(str(overlay), "qcow2", str(base), "qcow2"),),
        channels=(Channel("org.wnodes.agent.0", f"{lease_folder}/a.sock"),),
        boot=Boot(str(IMAGE / "vmlinuz"), str(IMAGE / "initrd"), "root=/dev/vda rw"),
    )
    yield vm
    assert plugin.wnodes_vm_stop(vm)


def test_the_guest_boots_and_its_bootstrap_greets(vm: Vm) -> None:
    starter, _ = Contract().start_elsewhere(vm)
    try:
        with socket.socket(socket.AF_UNIX) as host:
            host.settimeout(BOOT_S)
            host.connect(vm.channels[0].path)
            greeting = host.recv(100)
        assert greeting.startswith(b"WNODES-BOOT "), boot_failure(vm.console)
    finally:
        _end(starter)


def test_a_panic_ends_the_vm_at_once_and_is_quoted(vm: Vm) -> None:
    assert vm.boot is not None
    broken = replace(vm, boot=replace(vm.boot, cmdline="rdinit=/absent loglevel=4"))
    starter, process = Contract().start_elsewhere(broken)
    try:
        fd = open_pidfd(process)
        if fd is not None:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            assert poller.poll(BOOT_S * 1000), "QEMU outlived the panic"
            os.close(fd)
        # QEMU ended after the last words had been written, which is the order of events in a panic.
        assert time.time() - os.stat(vm.console).st_mtime < 5
        assert "Kernel panic" in Path(vm.console).read_text(errors="replace")
        assert "end" in boot_failure(vm.console)
    finally:
        _end(starter)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: nothing to be bound to")
def test_qemu_keeps_to_the_cpus_of_its_starter(vm: Vm) -> None:
    mine = os.sched_getaffinity(0)
    one = min(mine)
    os.sched_setaffinity(0, {one})
    try:
        starter, process = Contract().start_elsewhere(replace(vm, disks=(), boot=None))
    finally:
        os.sched_setaffinity(0, mine)
    try:
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            assert os.sched_getaffinity(int(thread)) == {one}
    finally:
        _end(starter)


def test_the_probe_guest_runs_under_tcg(tmp_path: Path) -> None:
    assert probe.run_guest("tcg", str(tmp_path)) == ""


def test_the_probe_answers_for_this_host(tmp_path: Path) -> None:
    facts = plugin.wnodes_vm_probe("auto", str(tmp_path))
    assert facts["accel"] in ("kvm", "tcg")
    assert bool(facts["notice"]) == (facts["accel"] == "tcg")
    assert facts["qemu"]
    assert facts["libvirt"]


def test_libvirt_is_loaded_only_when_a_vm_starts() -> None:
    program = "import sys, wnodes_core.backends.libvirt.plugin; sys.exit('libvirt' in sys.modules)"
    assert run([sys.executable, "-I", "-c", program], check=False).exit_code == 0


LEARN = """
import pathlib, sys
from wnodes_core.backends.libvirt import domain, embed, memory
memory.recall, memory.remember = (lambda *_: None), (lambda *_: None)
embed.learn(pathlib.Path(sys.argv[1]), domain.emulator("x86_64"), "x86_64", sys.argv[1])
"""


def test_a_qemu_that_libvirt_was_asking_when_it_was_killed_does_not_stay(vm: Vm, tmp_path: Path) -> None:
    starter = spawn([sys.executable, "-I", "-c", LEARN, str(tmp_path / "libvirt")])
    asked = _wait_for_asked(starter.pid)
    assert list(plugin._forgotten()) == [], "its libvirt lives: it is not forgotten"
    starter.kill()
    starter.wait(10)
    assert alive(asked), "nothing to prove: it ended with its libvirt"
    assert plugin.wnodes_vm_stop(vm)
    assert not alive(asked)


def _wait_for_asked(pid: int) -> Process:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [each for each in table() if plugin.asked_by(each.command) == pid]
        if found:
            return found[0]
        time.sleep(0.002)
    raise AssertionError("libvirt asked no QEMU")


def _end(starter) -> None:  # type: ignore[no-untyped-def]
    starter.kill()
    starter.wait(10)
    starter.stdin.close()
    starter.stdout.close()
