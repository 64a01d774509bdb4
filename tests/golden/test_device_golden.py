"""Devices that are plugged into a running domain, whole, and valid by libvirt's own schema."""

from __future__ import annotations

import pytest
from lxml import etree

from wnodes_core.api import Nic
from wnodes_core.backends.libvirt import devices

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


def test_a_stranger_s_nic_is_left_alone() -> None:
    assert devices.of_nic(Nic("infiniband")) is None


@pytest.mark.parametrize("address", ["", "3b:02.1", "0000:3b:02.8", "0000:3b:02.1\n", "0000:3b:02.1'/><x a='"])
def test_what_is_no_pci_address_never_gets_into_xml(address: str) -> None:
    with pytest.raises(ValueError, match="PCI address"):
        devices.of_nic(Nic("pci", device=address))
