"""Domain policy, piece by piece; whole texts are in tests/golden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from lxml import etree

from wnodes_core.api import Boot, Channel, Vm
from wnodes_core.backends.libvirt import domain
from wnodes_core.backends.libvirt.plugin import name_in
from wnodes_core.backends.libvirt.xml import Node, at
from wnodes_core.errors import LibvirtDown, SettingsError

VM = Vm(name="a-1", folder="/f", cpus=2, memory_mib=64, accel="tcg", disks=())


def texts(vm: Vm, path: str, **more: object) -> list[str]:
    found = etree.fromstring(domain.build(vm, **more).xml()).xpath(path)  # type: ignore[arg-type]
    return [str(each) for each in found]


@pytest.mark.parametrize("name", ["", "-a", "a,b", "a/b", "a b", "a" * 65, "a\n"])
def test_a_name_that_is_not_ours_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="VM name"):
        domain.build(replace(VM, name=name))


def test_socket_path_of_107_bytes_passes_and_of_108_is_refused() -> None:
    for length, fits in ((107, True), (108, False)):
        path = "/" + "é" * 50 + "x" * (length - 101)
        vm = replace(VM, channels=(Channel("p", path),))
        if fits:
            assert texts(vm, "//channel/source/@path") == [path]
        else:
            with pytest.raises(SettingsError, match="108 bytes, want at most 107"):
                domain.build(vm)


def test_unknown_architecture() -> None:
    with pytest.raises(LibvirtDown, match="'vax'"):
        domain.emulator("vax")


@pytest.mark.parametrize(
    ("accel", "given", "expected"),
    [
        ("kvm", "", "console=ttyS0 panic=-1"),
        ("kvm", "root=/dev/vda  rw", "root=/dev/vda rw console=ttyS0 panic=-1"),
        ("kvm", "panic=5 console=hvc0", "panic=5 console=hvc0"),
        ("tcg", "", "console=ttyS0 panic=-1 mitigations=off"),  # what an emulated CPU cannot have
        ("tcg", "panic=5 mitigations=auto", "panic=5 mitigations=auto console=ttyS0"),
    ],
)
def test_command_line_has_a_console_and_ends_on_panic(accel: str, given: str, expected: str) -> None:
    assert texts(replace(VM, accel=accel, boot=Boot("/k", "", given)), "//cmdline/text()") == [expected]


@pytest.mark.parametrize(
    ("cpuset", "affinity", "pins", "emulator"),
    [
        ((), (), [], []),
        ((), (1, 3), ["1,3", "1,3"], ["1,3"]),
        ((5, 4), (), ["4", "5"], ["4-5"]),
        ((4, 5, 6), (0,), ["4-6", "4-6"], ["4-6"]),
        ((4,), (), ["4", "4"], ["4"]),
    ],
)
def test_pinning(cpuset: tuple[int, ...], affinity: tuple[int, ...], pins: list[str], emulator: list[str]) -> None:
    vm = replace(VM, cpuset=cpuset)
    assert texts(vm, "//vcpupin/@cpuset", affinity=affinity) == pins
    assert texts(vm, "//emulatorpin/@cpuset", affinity=affinity) == emulator


def test_no_network_no_graphics_no_usb() -> None:
    assert not texts(VM, "//interface | //graphics | //video | //input")
    assert texts(VM, "//controller[@type='usb']/@model") == ["none"]


def test_every_way_to_end_ends_the_vm() -> None:
    for way in ("on_poweroff", "on_reboot", "on_crash"):
        assert texts(VM, f"//{way}/text()") == ["destroy"]


def argv(name: str, uuid: str) -> tuple[str, ...]:
    return ("/usr/bin/qemu", "-name", f"guest={name},debug-threads=on", "-S", "-uuid", uuid)


def test_our_qemu_is_known_by_name_and_uuid_together() -> None:
    assert name_in(argv("a-1", domain.vm_uuid("a-1"))) == "a-1"
    assert name_in(argv("a-12", domain.vm_uuid("a-1"))) == ""
    assert name_in(("/usr/bin/qemu", "-name", "guest=a-1")) == ""
    assert name_in(("-name",)) == ""
    assert name_in(()) == ""


def test_nodes_write_attributes_texts_flags_and_children_in_declared_order() -> None:
    @dataclass(kw_only=True)
    class Leaf(Node):
        TAG: ClassVar[str] = "leaf"
        number: int = at("@n")

    @dataclass(kw_only=True)
    class Tree(Node):
        TAG: ClassVar[str] = "tree"
        size: int | None = at("deep/er/@size")
        word: str | None = at("deep/er")
        flag: bool | None = at("flag")
        one: Leaf | None = at("")
        many: tuple[Leaf, ...] = at("box", ())

    tree = Tree(word="a<b", size=3, flag=True, one=Leaf(number=1), many=(Leaf(number=2), Leaf(number=3)))
    expected = """
    <tree><deep><er size="3">a&lt;b</er></deep><flag/><leaf n="1"/><box><leaf n="2"/><leaf n="3"/></box></tree>
    """
    assert etree.tostring(tree.element(), encoding="unicode") == expected.strip()
    assert Tree().xml() == "<tree/>\n"
