"""PCI devices: who gets which, and back to the host, on a sysfs of the test's own whose kernel is a few lines.

Real hardware is not where these tests run; what is written to which file, and what ip(8) is told, is held here.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.api import Port, errors
from wnodes_core.network import pci

sys.path.insert(0, str(Path(__file__).parent))
from pci_kit import GPU, PF, VFS, Machine  # noqa: E402

REAL_WRITE = pci._write
CARD = Port("lease", "fast", "pci", 1234, mac="02:00:00:00:00:07", vlan=42, uplink="ens1", addresses=("10.1.1.2/16",), gateways=("10.1.0.1",))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def allotted(port: Port, *taken: Port) -> Port:
    made = pci.wnodes_port_allot(port, taken)
    assert made is not None
    return made


def test_virtual_functions_of_the_uplink_are_given_one_each(machine: Machine) -> None:
    one = allotted(CARD)
    two = allotted(CARD, one)
    assert (one.device, two.device, one.mac) == (*VFS, CARD.mac)
    with pytest.raises(errors.HostBusy, match="all 2 devices are in use"):
        allotted(CARD, one, two)


def test_any_device_by_its_address(machine: Machine) -> None:
    gpu = allotted(replace(CARD, devices=("0000:af:*",), uplink=""))
    assert (gpu.device, gpu.mac) == (GPU, "")
    card = allotted(replace(CARD, devices=(PF,), uplink=""))
    assert card.mac == "06:00:00:00:00:01", "a whole card keeps its own"
    with pytest.raises(errors.TransientError, match="no such PCI device"):
        allotted(replace(CARD, devices=("0000:ff:*",), uplink=""))
    with pytest.raises(errors.TransientError, match="no device ens9 with virtual functions"):
        allotted(replace(CARD, uplink="ens9"))


def test_a_function_goes_to_the_job_s_user_and_back(machine: Machine) -> None:
    port = allotted(replace(CARD, rate_mbit=100))
    nic = pci.wnodes_port_attach(port)
    assert nic is not None
    assert (nic.kind, nic.device, nic.mac, nic.addresses) == ("pci", VFS[0], CARD.mac, CARD.addresses)
    vf = "ip link set dev ens1 vf 0 mac {} vlan {} spoofchk on trust off max_tx_rate {}"
    assert machine.told == [
        vf.format(CARD.mac, 42, 100),
        "driver_override vfio-pci", f"unbind {VFS[0]}", f"drivers_probe {VFS[0]}", "chown 1234 12",
    ]  # fmt: skip
    assert (machine.dev / "vfio/12").stat().st_mode & 0o777 == 0o600
    assert pci.wnodes_port_attach(port) == nic
    machine.told.clear()
    assert pci.wnodes_port_detach(port) is True
    assert machine.told == [
        "chown 0 12", "driver_override", f"unbind {VFS[0]}", f"drivers_probe {VFS[0]}",
        vf.format("00:00:00:00:00:00", 0, 0),
    ]  # fmt: skip
    assert machine.driver(VFS[0]) == "mlx5"
    assert pci.wnodes_port_detach(port) is True
    assert machine.driver(VFS[0]) == "mlx5"


def test_a_device_whose_group_has_others_is_refused(machine: Machine) -> None:
    port = allotted(CARD)
    machine.group(VFS[1], "12")
    with pytest.raises(errors.TransientError, match=f"shares its IOMMU group with {VFS[1]}"):
        pci.wnodes_port_attach(port)
    assert machine.driver(VFS[0]) == "mlx5"
    (machine.device(VFS[1]) / "class").write_text("0x060400\n")  # a bridge goes with the group
    assert pci.wnodes_port_attach(port)


@pytest.mark.parametrize("what", ["no group", "no driver", "gone"])
def test_what_does_not_work_is_told_and_undone(machine: Machine, what: str) -> None:
    port, words = allotted(CARD), {"no group": "has no IOMMU group", "no driver": "does not go to vfio-pci", "gone": "is not there"}[what]
    if what == "no group":
        (machine.device(VFS[0]) / "iommu_group").unlink()
    elif what == "no driver":
        machine.without.add("vfio-pci")
    else:
        port = replace(port, device="0000:3b:02.7")
    with pytest.raises(errors.TransientError, match=words):
        pci.wnodes_port_attach(port)
    assert pci.wnodes_port_detach(port) is True
    assert machine.driver(VFS[0]) == "mlx5"


@pytest.mark.parametrize("at", range(1, 6))
def test_a_death_at_any_moment_is_undone(machine: Machine, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    class Dead(BaseException):
        pass

    port = allotted(CARD)

    def dies(before: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            done = before(*args, **more)
            if len(machine.told) == at:
                raise Dead
            return done

        return call

    with monkeypatch.context() as patch:
        for name in ("run", "_write"):
            patch.setattr(pci, name, dies(getattr(pci, name)))
        patch.setattr(os, "chown", dies(os.chown))
        with pytest.raises(Dead):
            pci.wnodes_port_attach(port)
    assert pci.wnodes_port_detach(port) is True
    assert machine.driver(VFS[0]) == "mlx5"
    assert machine.told[-1].startswith("ip link set dev ens1 vf 0 mac 00:00:00:00:00:00 vlan 0")


def given(machine: Machine) -> Port:
    port = allotted(CARD)
    assert pci.wnodes_port_attach(port)
    return port


def test_a_device_that_somebody_holds_open_is_not_asked_back(machine: Machine) -> None:
    """The kernel would wait in ``unbind`` until they let go, and all of the node's devices with it."""
    port = given(machine)
    with (machine.dev / "vfio/12").open("r+b") as held, subprocess.Popen(["sleep", "60"], stdin=held) as holder:
        held.close()
        try:
            machine.told.clear()
            with pytest.raises(errors.TransientError, match=rf"{VFS[0]} is held open by process {holder.pid} \(sleep\)"):
                pci.wnodes_port_detach(port)
            assert machine.told == ["chown 0 12"], "nobody else comes by it meanwhile"
        finally:
            holder.kill()
    assert pci.wnodes_port_detach(port) is True
    assert machine.driver(VFS[0]) == "mlx5"


def test_a_device_that_is_busy_unseen_is_not_asked_back(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    port, honest = given(machine), os.open

    def busy(path: Any, *more: Any, **named: Any) -> int:
        if Path(path) == machine.dev / "vfio/12":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return honest(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", busy)
        with pytest.raises(errors.TransientError, match="is held open by a process that cannot be seen"):
            pci.wnodes_port_detach(port)
    assert pci.wnodes_port_detach(port) is True


def test_a_write_that_the_kernel_never_ends_is_given_up(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = given(machine)
    os.mkfifo(machine.sys / "bus/pci/drivers/vfio-pci/unbind")  # whoever writes to it waits for a reader
    fakes = machine.write
    monkeypatch.setattr(pci, "_WRITE_S", 0.3)
    monkeypatch.setattr(pci, "_write", lambda path, text: (REAL_WRITE if path.name == "unbind" else fakes)(path, text))
    began = time.monotonic()
    with pytest.raises(errors.TransientError, match=r"driver/unbind: the kernel takes no '0000:3b:02.0' within 0.3 s"):
        pci.wnodes_port_detach(port)
    assert time.monotonic() - began < 3
    (machine.sys / "bus/pci/drivers/vfio-pci/unbind").unlink()
    monkeypatch.setattr(pci, "_write", fakes)
    assert pci.wnodes_port_detach(port) is True
    ((path, child),) = pci._waiting.items()
    child.wait(5)
    pci._waiting[path] = SimpleNamespace(poll=lambda: None)  # as one that not even SIGKILL ends
    began = time.monotonic()
    with pytest.raises(errors.TransientError, match="the kernel takes no"):
        REAL_WRITE(path, VFS[0])
    assert time.monotonic() - began < 0.2, "no second child is left to wait"
    pci._waiting.clear()


def test_what_is_written_gets_there_and_what_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "unbind").write_text("")
    REAL_WRITE(tmp_path / "unbind", VFS[0])
    assert (tmp_path / "unbind").read_text() == VFS[0]
    with pytest.raises(OSError, match="No such file or directory"):
        REAL_WRITE(tmp_path / "nowhere/unbind", VFS[0])


@pytest.mark.parametrize("address", ["", "..", "../../etc", "0000:3b:02.0/../x", "0000:3b:02.9"])
def test_what_is_no_address_is_no_path(machine: Machine, address: str) -> None:
    with pytest.raises(ValueError, match="want DOMAIN:BUS:SLOT.FUNCTION"):
        pci.wnodes_port_attach(replace(CARD, device=address))


def test_other_kinds_are_left_alone() -> None:
    other = replace(CARD, kind="bridge")
    assert (pci.wnodes_port_allot(other, ()), pci.wnodes_port_attach(other), pci.wnodes_port_detach(other)) == (None, None, None)
