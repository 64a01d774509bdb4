"""Whole domain XML texts, each valid by libvirt's own schema.

``WNODES_REGENERATE=1 pytest tests/golden`` rewrites the files; the review is the diff.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from wnodes_core.api import Boot, Channel, Disk, Filesystem, Vm
from wnodes_core.backends.libvirt import devices, domain, objects
from wnodes_core.backends.libvirt.xml import Node

sys.path.insert(0, str(Path(__file__).parent))
from test_device_golden import CASES as PLUGGED  # noqa: E402
from test_device_golden import DISK as PLUGGED_DISK  # noqa: E402

FOLDER = Path(__file__).with_name("domain")
SCHEMA = "/usr/share/libvirt/schemas/domain.rng"
LEASE = "/var/lib/wnodes/leases/slurm-n0-12-ab12cd"
TEMPLATE = "/var/lib/wnodes/templates/t1"
AGENT = Channel("org.wnodes.agent.0", f"{LEASE}/agent.sock")
BOOT = Boot("/images/vmlinuz", "/images/initrd.img", "root=/dev/vda rw quiet")


def overlay(base: str, base_format: str, **more: object) -> Disk:
    return Disk(f"{LEASE}/overlay.qcow2", "qcow2", base, base_format, **more)  # type: ignore[arg-type]


def vm(**changes: object) -> Vm:
    plain = Vm(
        name="slurm-n0-12-ab12cd", folder=LEASE, cpus=1, memory_mib=512, accel="tcg",
        disks=(overlay("/images/debian12.qcow2", "qcow2"),), channels=(AGENT,), boot=BOOT,
        console=f"{LEASE}/console.log",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


SCRATCH = Disk(f"{LEASE}/scratch.raw", "raw", serial="scratch", size_mib=1024)
SEED = Disk(f"{LEASE}/seed.iso", "raw", read_only=True)
MOUNTS = tuple(Channel(f"org.wnodes.mount.{n}", f"{LEASE}/mount-{n}.sock") for n in range(2))
CASES = {
    "tcg-direct-boot": domain.build(vm()),
    "tcg-bound-to-cpus": domain.build(vm(cpus=2), affinity=(0, 1, 4)),
    "kvm-bios-raw-base": domain.build(
        vm(accel="kvm", boot=None, cpus=4, memory_mib=8192, disks=(overlay("/images/el9.raw", "raw"), SCRATCH, SEED),
           channels=(AGENT, *MOUNTS), cpuset=(8, 9, 10, 11))
    ),
    "kvm-shared-cpus": domain.build(vm(accel="kvm", cpus=2, cpuset=(0, 1, 2, 6))),
    "no-direct-io": domain.build(vm(boot=Boot("/images/k", "", "console=hvc0 panic=5")), direct_io=False),
    "odd-signs": domain.build(vm(disks=(overlay('/im ages/é<&>"\'.qcow2', "qcow2"),))),
    "template-mapped": domain.build(vm(channels=(AGENT, *MOUNTS)), template="mapped"),
    "template-saved-kvm": domain.build(vm(accel="kvm"), template="saved"),
    "template-growing": domain.build(vm(cpus=2, most_mib=4096), template="mapped"),
    "clone-saved": domain.build(
        vm(disks=(overlay(f"{TEMPLATE}/overlay.qcow2", "qcow2", serial="root", under="/images/debian12.qcow2",
                          under_format="qcow2"),),
           channels=(AGENT, MOUNTS[0], Channel("org.wnodes.mount.1", ""))),
        template="saved", called=False,
    ),
    "filesystems": domain.build(
        vm(filesystems=(Filesystem("virtiofs", f"{LEASE}/fs0.sock", "wnodes0"), Filesystem("9p", "/da ta", "wnodes1", True)))
    ),
    "nine-p": domain.build(vm(filesystems=(Filesystem("9p", "/data", "wnodes0"),))),
    "bare": domain.build(vm(disks=(), channels=(), boot=None, console="")),
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(SCHEMA))


@pytest.mark.parametrize("name", CASES)
def test_domain_is_as_reviewed(name: str) -> None:
    file = FOLDER / f"{name}.xml"
    # The emulator lies where the package is installed.
    text = CASES[name].xml().replace(domain.emulator("x86_64"), "/opt/wnodes/qemu_x86_64.sh")
    if os.environ.get("WNODES_REGENERATE") == "1":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_domain_is_valid_for_libvirt(name: str, schema: etree.RelaxNG) -> None:
    document = etree.fromstring(CASES[name].xml())
    assert schema.validate(document), schema.error_log


def test_the_schema_does_refuse(schema: etree.RelaxNG) -> None:
    broken = dataclasses.replace(CASES["bare"], on_crash="explode")
    assert not schema.validate(etree.fromstring(broken.xml()))


def test_there_is_no_file_without_a_case() -> None:
    assert {file.stem for file in FOLDER.glob("*.xml")} == set(CASES)


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for declared in dataclasses.fields(node):
        value = getattr(node, declared.name)
        for child in value if isinstance(value, tuple) else (value,):
            if isinstance(child, Node):
                yield from _nodes(child)


def test_every_declared_value_is_in_some_golden_file() -> None:
    kinds = [k for k in vars(objects).values() if isinstance(k, type) and issubclass(k, Node) and k is not Node]
    declared = {(kind.__name__, each.name) for kind in kinds for each in dataclasses.fields(kind)}
    plugged = [node for nic, _ in PLUGGED.values() if (node := devices.of_nic(nic))]
    plugged.append(domain.plugged(PLUGGED_DISK))
    used = {
        (type(node).__name__, each.name)
        for case in (*CASES.values(), *plugged)
        for node in _nodes(case)
        for each in dataclasses.fields(node)
        if getattr(node, each.name) not in (None, ())
    }
    assert declared - used == set(), "give each of these a golden case in CASES, or drop it from objects.py"
