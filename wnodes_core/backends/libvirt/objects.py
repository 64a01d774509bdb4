"""The parts of libvirt's domain XML that we use (https://libvirt.org/formatdomain.html).

Shape only: no class here knows why a value is chosen. Defaults are the words that make the
element what its name says, never a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wnodes_core.backends.libvirt.xml import Node, at, on_off, yes_no


@dataclass(kw_only=True)
class VcpuPin(Node):
    """One virtual CPU on these host CPUs."""

    TAG: ClassVar[str] = "vcpupin"
    vcpu: int = at("@vcpu")
    cpuset: str = at("@cpuset")


@dataclass(kw_only=True)
class Cputune(Node):
    """Where QEMU's threads may run."""

    TAG: ClassVar[str] = "cputune"
    vcpupins: tuple[VcpuPin, ...] = at("", ())
    emulator_cpuset: str | None = at("emulatorpin/@cpuset")


@dataclass(kw_only=True)
class NumaCell(Node):
    """One node of the guest's memory; memory devices are plugged into it."""

    TAG: ClassVar[str] = "cell"
    id: int = at("@id", 0)
    cpus: str = at("@cpus")
    memory: int = at("@memory")
    unit: str = at("@unit", "MiB")


@dataclass(kw_only=True)
class VirtioMem(Node):
    """Memory that the guest is given or takes back while it runs."""

    TAG: ClassVar[str] = "memory"
    model: str = at("@model", "virtio-mem")
    size_unit: str = at("target/size/@unit", "MiB")
    size_mib: int = at("target/size")
    node: int = at("target/node", 0)
    block_unit: str = at("target/block/@unit", "MiB")
    block_mib: int = at("target/block", 2)
    requested_unit: str = at("target/requested/@unit", "MiB")
    requested_mib: int = at("target/requested", 0)


@dataclass(kw_only=True)
class Cpu(Node):
    """The CPU model that the guest sees."""

    TAG: ClassVar[str] = "cpu"
    mode: str = at("@mode")
    match: str | None = at("@match")
    check: str | None = at("@check")
    migratable: str | None = at("@migratable")
    model_fallback: str | None = at("model/@fallback")
    model: str | None = at("model")
    sockets: int = at("topology/@sockets", 1)
    cores: int = at("topology/@cores", 1)
    threads: int = at("topology/@threads", 1)
    numa: NumaCell | None = at("numa")


@dataclass(kw_only=True)
class Backing(Node):
    """The read-only base below an overlay; stating it stops libvirt from probing image headers."""

    TAG: ClassVar[str] = "backingStore"
    type: str = at("@type", "file")
    format: str = at("format/@type")
    path: str = at("source/@file")
    under: Backing | None = at("")
    end: bool | None = at("backingStore", True)


@dataclass(kw_only=True)
class DiskDevice(Node):
    """A virtio block device on a file, or on a block device of the host (``node``)."""

    TAG: ClassVar[str] = "disk"
    type: str = at("@type", "file")
    device: str = at("@device", "disk")
    driver: str = at("driver/@name", "qemu")
    format: str = at("driver/@type")
    cache: str | None = at("driver/@cache")
    error_policy: str | None = at("driver/@error_policy")
    rerror_policy: str | None = at("driver/@rerror_policy")
    discard: str | None = at("driver/@discard")
    path: str | None = at("source/@file")
    node: str | None = at("source/@dev")
    backing: Backing | None = at("")
    target: str = at("target/@dev")
    bus: str = at("target/@bus", "virtio")
    read_only: bool | None = at("readonly")
    serial: str | None = at("serial")
    boot_order: int | None = at("boot/@order")


@dataclass(kw_only=True)
class FilesystemDevice(Node):
    """A host folder: behind a server's socket (virtiofs), or served by QEMU itself (9p, driver ``path``)."""

    TAG: ClassVar[str] = "filesystem"
    type: str = at("@type", "mount")
    access: str = at("@accessmode", "passthrough")
    multidevs: str | None = at("@multidevs")
    driver: str = at("driver/@type")
    socket: str | None = at("source/@socket")
    folder: str | None = at("source/@dir")
    tag: str = at("target/@dir")
    read_only: bool | None = at("readonly")


@dataclass(kw_only=True)
class Controller(Node):
    """A bus; model ``none`` says that there is to be none of that type."""

    TAG: ClassVar[str] = "controller"
    type: str = at("@type")
    model: str | None = at("@model")
    index: int | None = at("@index")
    ports: int | None = at("@ports")


@dataclass(kw_only=True)
class Serial(Node):
    """The first serial port, written to a file."""

    TAG: ClassVar[str] = "serial"
    type: str = at("@type", "file")
    path: str = at("source/@path")
    append: bool = at("source/@append", True, convert=on_off)
    port: int = at("target/@port", 0)


@dataclass(kw_only=True)
class ChannelDevice(Node):
    """A virtio-serial port: a name in the guest, a Unix socket that QEMU listens on or calls at."""

    TAG: ClassVar[str] = "channel"
    type: str = at("@type", "unix")
    mode: str | None = at("source/@mode", "bind")
    path: str | None = at("source/@path")
    target: str = at("target/@type", "virtio")
    name: str = at("target/@name")


@dataclass(kw_only=True)
class Interface(Node):
    """A virtio NIC; ``managed`` False: the tap is there already."""

    TAG: ClassVar[str] = "interface"
    type: str = at("@type")
    mac: str = at("mac/@address")
    tap: str | None = at("target/@dev")
    managed: bool | None = at("target/@managed", convert=yes_no)
    model: str = at("model/@type", "virtio")
    checksums: bool | None = at("driver/host/@csum", convert=on_off)
    mtu: int | None = at("mtu/@size")
    rom: bool = at("rom/@enabled", False, convert=yes_no)


@dataclass(kw_only=True)
class HostDevice(Node):
    """A PCI device of the host; not managed: it has its driver for guests already."""

    TAG: ClassVar[str] = "hostdev"
    mode: str = at("@mode", "subsystem")
    type: str = at("@type", "pci")
    managed: bool = at("@managed", False, convert=yes_no)
    driver: str = at("driver/@name", "vfio")
    domain: str = at("source/address/@domain")
    bus: str = at("source/address/@bus")
    slot: str = at("source/address/@slot")
    function: str = at("source/address/@function")


@dataclass(kw_only=True)
class Rng(Node):
    """A source of entropy from the host."""

    TAG: ClassVar[str] = "rng"
    model: str = at("@model", "virtio")
    backend: str = at("backend/@model", "random")
    path: str = at("backend", "/dev/urandom")


@dataclass(kw_only=True)
class Memballoon(Node):
    """The balloon; model ``none`` leaves it out."""

    TAG: ClassVar[str] = "memballoon"
    model: str = at("@model")


@dataclass(kw_only=True)
class Panic(Node):
    """The device through which a guest kernel tells that it panicked."""

    TAG: ClassVar[str] = "panic"
    model: str = at("@model")


@dataclass(kw_only=True)
class Domain(Node):
    """A whole domain."""

    TAG: ClassVar[str] = "domain"
    type: str = at("@type")
    name: str = at("name")
    uuid: str = at("uuid")
    lease: str = at("metadata/wnodes:lease/@name")
    most_slots: int | None = at("maxMemory/@slots")
    most_unit: str | None = at("maxMemory/@unit")
    most_mib: int | None = at("maxMemory")
    memory_unit: str = at("memory/@unit", "MiB")
    dump_core: bool = at("memory/@dumpCore", False, convert=on_off)
    memory_mib: int = at("memory")
    memory_source: str | None = at("memoryBacking/source/@type")
    memory_access: str | None = at("memoryBacking/access/@mode")
    vcpu_placement: str = at("vcpu/@placement", "static")
    vcpus: int = at("vcpu")
    cputune: Cputune | None = at("")
    arch: str = at("os/type/@arch")
    machine: str = at("os/type/@machine")
    os_type: str = at("os/type", "hvm")
    kernel: str | None = at("os/kernel")
    initrd: str | None = at("os/initrd")
    cmdline: str | None = at("os/cmdline")
    acpi: bool = at("features/acpi", True)
    tb_cache_unit: str | None = at("features/tcg/tb-cache/@unit")
    tb_cache_mib: int | None = at("features/tcg/tb-cache")
    cpu: Cpu = at("")
    clock: str = at("clock/@offset", "utc")
    on_poweroff: str = at("on_poweroff", "destroy")
    on_reboot: str = at("on_reboot", "destroy")
    on_crash: str = at("on_crash", "destroy")
    emulator: str = at("devices/emulator")
    devices: tuple[Node, ...] = at("devices", ())
