"""PCI devices: who gets which, and back to the host, on a sysfs of the test's own whose kernel is a few lines.

Real hardware is not where these tests run; what is written to which file, and what ip(8) is told, is held here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Port, errors
from wnodes_core.network import pci

PF, GPU = "0000:3b:00.0", "0000:af:00.0"
VFS = ("0000:3b:02.0", "0000:3b:02.1")
CARD = Port("lease", "fast", "pci", 1234, mac="02:00:00:00:00:07", vlan=42, uplink="ens1", addresses=("10.1.1.2/16",), gateways=("10.1.0.1",))


class Machine:
    """A host with a card of two virtual functions and a GPU; writes have the kernel's effects."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sys, self.dev, self.told = folder / "sys", folder / "dev", list[str]()
        self.own = {PF: "mlx5", GPU: "nvidia", **dict.fromkeys(VFS, "mlx5")}
        (self.dev / "vfio").mkdir(parents=True)
        for number, address in enumerate(self.own, 10):
            self.device(address).mkdir(parents=True)
            (self.device(address) / "class").write_text("0x020000\n")
            self.group(address, str(number))
            self.bind(address, self.own[address])
        for number, address in enumerate(VFS):
            (self.device(address) / "physfn").symlink_to(self.device(PF))
            (self.device(PF) / f"virtfn{number}").symlink_to(self.device(address))
        (self.device(PF) / "net/ens1").mkdir(parents=True)
        (self.device(PF) / "net/ens1/address").write_text("06:00:00:00:00:01\n")
        (self.sys / "class/net/ens1").mkdir(parents=True)
        (self.sys / "class/net/ens1/device").symlink_to(self.device(PF))
        monkeypatch.setattr(pci, "SYS", self.sys)
        monkeypatch.setattr(pci, "DEV", self.dev)
        monkeypatch.setattr(pci, "_write", self.write)
        monkeypatch.setattr(pci, "_SETTLES_S", 0.05)
        monkeypatch.setattr(pci, "run", lambda argv, **more: self.told.append(" ".join(argv)))
        monkeypatch.setattr(os, "chown", lambda path, uid, gid: self.told.append(f"chown {uid} {Path(path).name}"))
        self.without: set[str] = set()  # drivers that are not there

    def device(self, address: str) -> Path:
        return self.sys / "bus/pci/devices" / address

    def group(self, address: str, number: str) -> None:
        folder = self.sys / "kernel/iommu_groups" / number / "devices"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / address).touch()
        link = self.device(address) / "iommu_group"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.parent)

    def bind(self, address: str, driver: str) -> None:
        folder = self.sys / "bus/pci/drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        (self.device(address) / "driver").symlink_to(folder)
        if driver == "vfio-pci":
            (self.dev / "vfio" / os.path.basename(os.path.realpath(self.device(address) / "iommu_group"))).touch()

    def driver(self, address: str) -> str:
        link = self.device(address) / "driver"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    def write(self, path: Path, text: str) -> None:
        self.told.append(f"{path.name} {text.strip()}".strip())
        if path.name == "driver_override":
            path.write_text(text.strip())
        elif path.name == "unbind":
            (self.device(text) / "driver").unlink()
            node = self.dev / "vfio" / os.path.basename(os.path.realpath(self.device(text) / "iommu_group"))
            node.unlink(missing_ok=True)
        elif path.name == "drivers_probe" and not self.driver(text):
            override = self.device(text) / "driver_override"
            wanted = (override.read_text() if override.exists() else "") or self.own[text]
            if wanted not in self.without:
                self.bind(text, wanted)


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


@pytest.mark.parametrize("address", ["", "..", "../../etc", "0000:3b:02.0/../x", "0000:3b:02.9"])
def test_what_is_no_address_is_no_path(machine: Machine, address: str) -> None:
    with pytest.raises(ValueError, match="want DOMAIN:BUS:SLOT.FUNCTION"):
        pci.wnodes_port_attach(replace(CARD, device=address))


def test_other_kinds_are_left_alone() -> None:
    other = replace(CARD, kind="bridge")
    assert (pci.wnodes_port_allot(other, ()), pci.wnodes_port_attach(other), pci.wnodes_port_detach(other)) == (None, None, None)
