"""A sysfs of the test's own, whose kernel is a few lines: a host with PCI devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wnodes_core.network import pci

PF, GPU = "0000:3b:00.0", "0000:af:00.0"
VFS = ("0000:3b:02.0", "0000:3b:02.1")


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
