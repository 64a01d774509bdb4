"""From a Vm to libvirt's domain XML. All policy on devices stands here, with its reasons."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

from wnodes_core.api import Boot, Channel, Disk, Filesystem, Vm, errors
from wnodes_core.backends.libvirt import objects
from wnodes_core.backends.libvirt.xml import Node

# Memory of the job that is not the guest's, in MiB, by accelerator. Measured (QEMU 7.2, guests of 512
# and 1024 MiB that touched every page): QEMU itself 65, the filled part of the translation buffer
# 75 after a boot and TB_CACHE_MIB at most, the keeper with libvirt 57; the rest is for one launcher,
# gateways and page tables.
OVERHEAD_MIB = {"kvm": 192, "tcg": 320}

# QEMU's translation buffer grows to 1 GiB if nobody bounds it; a job would then be killed for
# memory that it never asked for.
TB_CACHE_MIB = 128

# x86-64-v2 (SSE4.2, POPCNT) is what EL9 demands; under TCG a richer model only costs time.
TCG_CPU = {"x86_64": "Nehalem"}
MACHINES = {"x86_64": "q35"}

_PLUGGED = 3  # what a clone can be given: a NIC, a scratch disk, file systems (functions of one device)
_SUN_PATH = 107  # unix(7): 108 bytes with the closing NUL
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_DISK_NAMES = "abcdefghijklmnopqrstuvwxyz"
_NAMESPACE = uuid.UUID("6d1e1f0c-4a64-5d0e-9a3e-0f7c1f3a9b52")
# libvirt restores a saved domain under its own name and uuid only, so all clones of that way share these.
SAVED_NAME = "wnodes-saved"


def emulator(arch: str) -> str:
    """The program that libvirt starts as QEMU for ``arch``.

    Raises LibvirtDown for an architecture that we have no domain for.
    """
    if arch not in MACHINES:
        raise errors.LibvirtDown(f"no VM of architecture {arch!r} here: want one of {', '.join(MACHINES)}")
    return str(Path(__file__).with_name(f"qemu_{arch}.sh"))


def vm_uuid(name: str) -> str:
    """The domain's uuid, told by its name alone, so that our VMs are known by their argv."""
    return str(uuid.uuid5(_NAMESPACE, name))


def build(
    vm: Vm, *, direct_io: bool = True, affinity: Sequence[int] = (), template: str = "", called: bool = True
) -> objects.Domain:
    """The domain that runs ``vm``.

    ``direct_io`` says that the disks' file systems know O_DIRECT. ``affinity`` are the CPUs to
    keep to when the VM names none. ``template`` is the way in which it is to be saved or was (``mapped``:
    its memory is a file that QEMU shares). With ``called`` false QEMU calls at the agent's socket
    itself, where its keeper listens already: a clone's agent must never see its port hang up.

    Raises SettingsError for a socket path that is too long, ValueError for a name that is not ours.
    """
    if not _NAME.match(vm.name):
        raise ValueError(f"VM name {vm.name!r}: want letters, digits, '.', '_' and '-', at most 64")
    boot, name = vm.boot, SAVED_NAME if template == "saved" else vm.name
    tcg, grows = vm.accel == "tcg", vm.most_mib > vm.memory_mib
    return objects.Domain(
        type="qemu" if tcg else "kvm",
        name=name,
        uuid=vm_uuid(name),
        lease=vm.name,
        memory_mib=max(vm.memory_mib, vm.most_mib),  # what is not plugged in yet counts
        memory_source=_memory_source(vm, template),
        memory_access="shared" if _memory_source(vm, template) else None,
        most_slots=1 if grows else None,
        most_unit="MiB" if grows else None,
        most_mib=vm.most_mib if grows else None,
        vcpus=vm.cpus,
        cputune=_pinning(vm, affinity),
        arch=vm.arch,
        machine=MACHINES[vm.arch],
        kernel=boot.kernel if boot else None,
        initrd=(boot.initrd or None) if boot else None,
        cmdline=_cmdline(boot, grows=grows, tcg=tcg) if boot else None,
        tb_cache_unit="MiB" if tcg else None,
        tb_cache_mib=TB_CACHE_MIB if tcg else None,
        cpu=_cpu(vm, migratable=bool(template)),
        emulator=emulator(vm.arch),
        devices=_devices(vm, "none" if direct_io else "writeback", called, _PLUGGED if template else 0),
    )


def _devices(vm: Vm, cache: str, called: bool, free_slots: int) -> tuple[Node, ...]:
    # No NIC, no graphics, no USB, no balloon: what is not there cannot be attacked, costs no start-up
    # time and no memory. on_crash needs the panic device to hear of a panic.
    disks = tuple(
        _disk(disk, f"vd{_DISK_NAMES[index]}", cache, boots=vm.boot is None and index == 0)
        for index, disk in enumerate(vm.disks)
    )
    console = (objects.Serial(path=vm.console),) if vm.console else ()
    return (
        *disks,
        *(_filesystem(each) for each in vm.filesystems),
        objects.Controller(type="usb", model="none"),
        *_slots(vm, free_slots),
        objects.Controller(type="virtio-serial", index=0, ports=31),
        *console,
        *(_channel(channel, called or index > 0) for index, channel in enumerate(vm.channels)),
        objects.Memballoon(model="none"),
        objects.Rng(),
        objects.Panic(model="isa"),
        *((objects.VirtioMem(size_mib=vm.most_mib - vm.memory_mib),) if vm.most_mib > vm.memory_mib else ()),
    )


def _slots(vm: Vm, free: int) -> tuple[Node, ...]:
    """Slots for all devices and ``free`` more: libvirt by itself leaves one free, and a NIC may have taken that."""
    if not free:
        return ()
    used = len(vm.disks) + len(vm.filesystems) + 2 + (vm.most_mib > vm.memory_mib)  # serial ports, random numbers
    ports = range(1, used + free + 1)  # 0 is the root that they hang on
    return tuple(objects.Controller(type="pci", index=n, model="pcie-root-port") for n in ports)


def _memory_source(vm: Vm, template: str) -> str | None:
    """What the guest's memory is made of where another process has to see it; None for QEMU's own."""
    if template == "mapped":
        return "file"
    return "memfd" if any(each.kind == "virtiofs" for each in vm.filesystems) else None


def _filesystem(each: Filesystem) -> objects.FilesystemDevice:
    if each.kind == "virtiofs":  # read-only is its server's and its mount's business: libvirt knows no such device
        return objects.FilesystemDevice(driver="virtiofs", socket=_socket(each.source), tag=each.tag)
    # squash: files are QEMU's user's, who is the job's, whatever the guest says. remap: files of several file
    # systems below one folder keep different inode numbers.
    return objects.FilesystemDevice(
        access="squash",
        multidevs="remap",
        driver="path",
        folder=each.source,
        tag=each.tag,
        read_only=True if each.read_only else None,
    )


def _channel(channel: Channel, called: bool) -> objects.ChannelDevice:
    if not channel.path:  # a mount port that this VM has no mount for
        return objects.ChannelDevice(type="null", mode=None, path=None, name=channel.name)
    return objects.ChannelDevice(mode="bind" if called else "connect", path=_socket(channel.path), name=channel.name)


def plugged(disk: Disk, *, direct_io: bool = True) -> objects.DiskDevice:
    """A disk for a VM that runs: behind all that it may have started with. ``direct_io`` as in ``build``."""
    return _disk(disk, f"vd{_DISK_NAMES[-1]}", "none" if direct_io else "writeback", boots=False)


def _disk(disk: Disk, target: str, cache: str, *, boots: bool) -> objects.DiskDevice:
    return objects.DiskDevice(
        type="block" if disk.block else "file",
        format=disk.format,
        cache=cache,
        # QEMU's default for a full host disk is to pause the guest: the job would hang until its
        # time limit. The guest gets an I/O error instead.
        error_policy="report",
        rerror_policy="report",
        # A scratch disk's room was set aside for it: the guest must not give it back, and find it taken.
        discard="ignore" if disk.size_mib else "unmap",
        path=None if disk.block else disk.path,
        node=disk.path if disk.block else None,
        backing=_backing(disk),
        target=target,
        read_only=True if disk.read_only else None,
        serial=disk.serial or None,
        boot_order=1 if boots else None,
    )


def _backing(disk: Disk) -> objects.Backing | None:
    if not disk.base:
        return None
    under = objects.Backing(format=disk.under_format, path=disk.under) if disk.under else None
    return objects.Backing(format=disk.base_format, path=disk.base, under=under, end=None if under else True)


def _cpu(vm: Vm, *, migratable: bool) -> objects.Cpu:
    # Memory devices want a NUMA node to be plugged into.
    grows = vm.most_mib > vm.memory_mib
    cell = objects.NumaCell(cpus=_ranges(range(vm.cpus)), memory=vm.memory_mib) if grows else None
    if vm.accel == "tcg":
        # check='none': libvirt would compare with the host's CPU, which plays no part in TCG.
        return objects.Cpu(
            mode="custom",
            match="exact",
            check="none",
            model_fallback="forbid",
            model=TCG_CPU[vm.arch],
            cores=vm.cpus,
            numa=cell,
        )
    # The VM lives and dies on this host, so it may have every feature of it, but for the one with which
    # QEMU refuses to save a guest, the invariant clock (target/i386/kvm/kvm.c, invtsc_mig_blocker). Nested
    # VMX or SVM refuses it too on kernels before 4.20, which cannot tell its state.
    off = "on" if migratable else "off"
    return objects.Cpu(mode="host-passthrough", check="none", migratable=off, cores=vm.cpus, numa=cell)


def _pinning(vm: Vm, affinity: Sequence[int]) -> objects.Cputune | None:
    # libvirt lets a QEMU without pins run on every online CPU, out of a batch system's binding that is
    # affinity only (no cpuset cgroup). So without a cpuset the caller's own affinity is stated.
    whole = _ranges(vm.cpuset or affinity)
    if not whole:
        return None
    each = tuple(str(cpu) for cpu in sorted(vm.cpuset)) if len(set(vm.cpuset)) == vm.cpus else (whole,)
    return objects.Cputune(vcpupins=_pins(vm.cpus, each), emulator_cpuset=whole)


def _pins(cpus: int, cpusets: tuple[str, ...]) -> tuple[objects.VcpuPin, ...]:
    return tuple(objects.VcpuPin(vcpu=n, cpuset=cpusets[n % len(cpusets)]) for n in range(cpus))


def _ranges(cpus: Sequence[int]) -> str:
    """CPU numbers in the kernel's list format.

    >>> _ranges((3, 0, 1, 2, 7))
    '0-3,7'
    """
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cmdline(boot: Boot, *, grows: bool, tcg: bool) -> str:
    """The image's kernel command line; a panic ends the VM (panic=-1: at once) and is on the console.

    A guest that may grow beyond 4 GiB sets 64 MiB aside to copy for devices that reach no further.
    None of ours is such a one: 2 MiB (1024 pieces of 2 KiB) will do.

    An emulated CPU has none of the faults that Linux guards against, but the guards cost it: each call into the
    kernel changes page tables, and QEMU then forgets all its translations. Measured: half the guest's CPU time
    of a read through sshfs.
    """
    words = boot.cmdline.split()
    more = [word for word, wanted in (("swiotlb=1024", grows), ("mitigations=off", tcg)) if wanted]
    for word in ("console=ttyS0", "panic=-1", *more):
        key = word.partition("=")[0] + "="
        if not any(given.startswith(key) for given in words):
            words.append(word)
    return " ".join(words)


def _socket(path: str) -> str:
    if len(os.fsencode(path)) > _SUN_PATH:
        raise errors.SettingsError(
            f"channel socket {path!r}: {len(os.fsencode(path))} bytes, want at most {_SUN_PATH}",
            hint="give wnodes a shorter state_dir",
        )
    return path
