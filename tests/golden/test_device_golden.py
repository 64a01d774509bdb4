"""Devices that are plugged into a running domain, whole, and valid by libvirt's own schema."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lxml import etree

from wnodes_core.api import Disk, Filesystem, Nic
from wnodes_core.backends.libvirt import devices, domain

MAC = "02:00:00:00:00:07"
CASES = {
    "user": (
        Nic("user", MAC),
        f"""<interface type="user">
  <mac address="{MAC}"/>
  <model type="virtio"/>
  <rom enabled="no"/>
</interface>
""",
    ),
    "tap": (
        Nic("tap", MAC, device="wnt1a2b3c4d", mtu=9000),
        f"""<interface type="ethernet">
  <mac address="{MAC}"/>
  <target dev="wnt1a2b3c4d" managed="no"/>
  <model type="virtio"/>
  <mtu size="9000"/>
  <rom enabled="no"/>
</interface>
""",
    ),
    "tap of a switch in user space": (
        Nic("tap", MAC, device="wnt1a2b3c4d", offload=False),
        f"""<interface type="ethernet">
  <mac address="{MAC}"/>
  <target dev="wnt1a2b3c4d" managed="no"/>
  <model type="virtio"/>
  <driver>
    <host csum="off"/>
  </driver>
  <rom enabled="no"/>
</interface>
""",
    ),
    "pci": (
        Nic("pci", MAC, device="0000:3b:02.1"),
        """<hostdev mode="subsystem" type="pci" managed="no">
  <driver name="vfio"/>
  <source>
    <address domain="0x0000" bus="0x3b" slot="0x02" function="0x1"/>
  </source>
</hostdev>
""",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_device_is_as_reviewed(kind: str) -> None:
    nic, text = CASES[kind]
    device = devices.of_nic(nic)
    assert device is not None
    assert device.xml() == text


@pytest.mark.parametrize("kind", CASES)
def test_a_device_is_valid_for_libvirt(kind: str) -> None:
    schema = etree.RelaxNG(etree.parse("/usr/share/libvirt/schemas/domain.rng"))
    text = CASES[kind][1]
    domain = f"<domain type='qemu'><name>x</name><memory>1</memory><os><type>hvm</type></os><devices>{text}</devices></domain>"
    document = etree.fromstring(domain)
    assert schema.validate(document), schema.error_log


DISK = Disk("/dev/wnodes/0a/wnodes-l", "raw", serial="scratch", size_mib=1024, block=True)
DISK_XML = """<disk type="block" device="disk">
  <driver name="qemu" type="raw" cache="none" error_policy="report" rerror_policy="report" discard="ignore"/>
  <source dev="/dev/wnodes/0a/wnodes-l"/>
  <target dev="vdz" bus="virtio"/>
  <serial>scratch</serial>
</disk>
"""


def test_a_disk_is_as_reviewed_and_valid() -> None:
    assert domain.plugged(DISK).xml() == DISK_XML
    file = domain.plugged(replace(DISK, path="/l/scratch.qcow2", format="qcow2", block=False), direct_io=False).xml()
    assert '<disk type="file"' in file and 'file="/l/scratch.qcow2"' in file and 'cache="writeback"' in file
    schema = etree.RelaxNG(etree.parse("/usr/share/libvirt/schemas/domain.rng"))
    text = f"<domain type='qemu'><name>x</name><memory>1</memory><os><type>hvm</type></os><devices>{DISK_XML}</devices></domain>"
    assert schema.validate(etree.fromstring(text)), schema.error_log


def test_a_clone_s_qemu_is_given_the_same_disk() -> None:
    common = {"read-only": False, "cache": {"direct": True, "no-flush": False}, "discard": "ignore"}
    assert devices.disk_orders(DISK, "/dev/fdset/3", "pci.5", direct_io=True) == (
        {"driver": "host_device", "node-name": "scratch-storage", "filename": "/dev/fdset/3", **common},
        {"driver": "raw", "node-name": "scratch-format", "file": "scratch-storage", **common},
        {"driver": "virtio-blk-pci", "id": "scratch0", "drive": "scratch-format", "serial": "scratch", "bus": "pci.5",
         "write-cache": "on", "werror": "report", "rerror": "report"},
    )  # fmt: skip


def test_a_stranger_s_nic_is_left_alone() -> None:
    assert devices.of_nic(Nic("infiniband")) is None


@pytest.mark.parametrize("address", ["", "3b:02.1", "0000:3b:02.8", "0000:3b:02.1\n", "0000:3b:02.1'/><x a='"])
def test_what_is_no_pci_address_never_gets_into_xml(address: str) -> None:
    with pytest.raises(ValueError, match="PCI address"):
        devices.of_nic(Nic("pci", device=address))


def test_a_clone_s_qemu_is_given_the_same() -> None:
    assert devices.orders(CASES["user"][0], "pci.5") == (
        {"type": "user", "id": "hostnet0"},
        {"driver": "virtio-net-pci", "id": "net0", "netdev": "hostnet0", "mac": MAC, "romfile": "", "bus": "pci.5"},
    )
    netdev, device = devices.orders(CASES["tap"][0], "pci.5")
    assert netdev == {"type": "tap", "id": "hostnet0", "ifname": "wnt1a2b3c4d", "script": "no", "downscript": "no"}
    assert device["host_mtu"] == 9000
    assert "csum" not in device
    assert devices.orders(CASES["tap of a switch in user space"][0], "pci.5")[1]["csum"] is False
    assert devices.orders(CASES["pci"][0], "pci.5") == (
        {}, {"driver": "vfio-pci", "id": "hostdev0", "host": "0000:3b:02.1", "bus": "pci.5"},
    )  # fmt: skip


def test_a_free_slot_is_an_empty_root_port() -> None:
    def port(name: str, *devices: str) -> dict[str, object]:
        return {"qdev_id": name, "pci_bridge": {"bus": {}, "devices": [{"qdev_id": each} for each in devices]}}

    machine = [{"bus": 0, "devices": [{"qdev_id": ""}, port("pci.1", "virtio-disk0"), {"qdev_id": "video0"}, port("pci.2")]}]
    assert devices.free_bus(machine) == "pci.2"
    assert devices.free_bus([{"bus": 0, "devices": [port("pci.1", "x")]}]) == ""


def test_file_systems_are_functions_of_one_device_that_is_told_of_when_it_is_whole() -> None:
    pair = tuple(Filesystem("virtiofs", f"/lease/fs{n}.sock", f"wnodes{n}") for n in range(2))
    (second, its_device), (first, device) = devices.filesystem_orders(pair, "pci.6")
    assert [each["id"] for each in (second, first)] == ["charfs1", "charfs0"], "function 0 comes last"
    assert first == {
        "id": "charfs0",
        "backend": {
            "type": "socket",
            "data": {"addr": {"type": "unix", "data": {"path": "/lease/fs0.sock"}}, "server": False},
        },
    }
    assert device == {
        **{"driver": "vhost-user-fs-pci", "id": "fs0", "chardev": "charfs0", "tag": "wnodes0", "bus": "pci.6"},
        **{"addr": "0x0.0x0", "multifunction": True, "queue-size": 1024},
    }
    assert its_device["addr"] == "0x0.0x1" and not its_device["multifunction"]
    ((_, alone),) = devices.filesystem_orders(pair[:1], "pci.6")
    assert not alone["multifunction"]
    with pytest.raises(ValueError, match="want 8 at most"):
        list(devices.filesystem_orders(pair * 5, "pci.6"))
