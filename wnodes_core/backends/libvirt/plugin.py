"""The libvirt backend's hooks. libvirt itself is imported only where a VM starts or pauses."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from wnodes_core.api import Disk, Filesystem, Nic, Process, Template, Vm, errors, hookimpl
from wnodes_core.backends.libvirt import devices, domain, host
from wnodes_core.backends.libvirt.probe import probe, state_dir_of
from wnodes_core.tools import kill, read, table

wnodes_api = 1
KVM = "/dev/kvm"
WAYS = ("mapped", "saved")
_ASKED = re.compile(r"/proc/([1-9]\d*)/fd/\d+/lib/qemu/qmp-[^/]+/qmp\.pid\Z")
_OVERLAY = re.compile(r'"driver":"file","filename":"([^"]+/overlay\.qcow2)"')
_STOP_DEADLINE_S = 10.0


@hookimpl
def wnodes_vm_probe(accel: str, folder: str) -> dict[str, Any]:
    """Prove what this host can run."""
    return probe(accel, folder)


@hookimpl
def wnodes_vm_start(vm: Vm) -> Process:
    """Start the VM in this process's embedded driver."""
    from wnodes_core.backends.libvirt import embed

    running = next((process for process in _find(vm.name) if process.uid == os.getuid()), None)
    if running:
        return running
    _want_kvm(vm)
    return _started(embed, vm, _xml(vm))


def _want_kvm(vm: Vm) -> None:
    if vm.accel == "kvm" and not os.access(KVM, os.R_OK | os.W_OK):
        who = f"uid {os.getuid()} with the groups {sorted(os.getgroups())}"
        raise errors.NoKvm(f"{KVM} may not be opened by {who}", hint="add the user to the device's group")


def _xml(vm: Vm, **how: Any) -> str:
    if how.get("template") == "saved" and vm.name != (wanted := _name_by_folder(vm.disks[0].path)):
        raise errors.TransientError(f"VM {vm.name}: its disk's folder would have it called {wanted}")
    disks = [path for disk in vm.disks for path in (disk.path, disk.base) if path]
    return domain.build(vm, direct_io=all(map(knows_direct_io, disks)), affinity=_affinity(), **how).xml()


def _started(embed: ModuleType, vm: Vm, xml: str, saved: str = "") -> Process:
    root = Path(vm.folder) / "libvirt"
    embed.start(xml, vm.name, root, domain.emulator(vm.arch), state_dir_of(vm.folder), _end, saved)
    found = next(_find(vm.name), None)
    if found is None:
        raise errors.GuestPanic(f"VM {vm.name}: QEMU ended as soon as it had started")
    return found


@hookimpl
def wnodes_template_ways(accel: str) -> Sequence[str]:
    """Both ways, wherever libvirt and QEMU are: Debian 12's and EL 9's have all that they need."""
    return WAYS


@hookimpl
def wnodes_template_host(accel: str) -> str | None:
    """QEMU's file, the kernel that runs KVM, the processor: what a saved state hangs on."""
    return host.description(accel)


@hookimpl
def wnodes_template_start(vm: Vm, way: str) -> Process | None:
    """Boot a guest whose memory can be kept."""
    if way not in WAYS:
        return None
    from wnodes_core.backends.libvirt import embed

    _want_kvm(vm)
    return _started(embed, vm, _xml(vm, template=way))


@hookimpl
def wnodes_template_save(vm: Vm, way: str) -> dict[str, Any] | None:
    """Write the state down, by the way the guest was started for."""
    if way not in WAYS:
        return None
    from wnodes_core.backends.libvirt import template

    process = next(_find(vm.name), None)
    if process is None:
        raise errors.GuestPanic(f"VM {vm.name}: it ended before it could be saved")
    return template.save(vm, way, process, _end)


@hookimpl
def wnodes_vm_clone(vm: Vm, template: Template) -> Process | None:
    """Clone by the way that the template was made."""
    if template.way not in WAYS:
        return None
    _want_kvm(vm)
    if template.way == "mapped":
        from wnodes_core.backends.libvirt import clone

        return clone.start(vm, template, direct_io=all(knows_direct_io(disk.path) for disk in vm.disks[:1]))
    from wnodes_core.backends.libvirt import embed
    from wnodes_core.backends.libvirt.template import machine_of

    # What libvirt restores must have the saved machine's memory; it grows afterwards.
    memory_mib, most_mib = machine_of(template)
    xml = _xml(replace(vm, memory_mib=memory_mib, most_mib=most_mib), template="saved", called=False)
    process = _started(embed, vm, xml, f"{template.folder}/{template.files['image']}")
    embed.grow(vm.name, vm.memory_mib - memory_mib)
    return process


@hookimpl
def wnodes_vm_fit(vm: Vm, template: Template) -> bool:
    """Fit a clone that this process started, in the way whose clones can wait."""
    clone = sys.modules.get("wnodes_core.backends.libvirt.clone")
    return bool(clone and clone.fit(vm, template))


@hookimpl
def wnodes_vm_pause(vm: Vm, paused: bool) -> bool:
    """Pause or resume a VM that this process started."""
    ours = (sys.modules.get(f"wnodes_core.backends.libvirt.{name}") for name in ("clone", "embed"))
    return any(module.pause(vm.name, paused) for module in ours if module)


@hookimpl
def wnodes_vm_plug(vm: Vm, nic: Nic) -> bool | None:
    """Plug a NIC into a VM that this process started."""
    device, clone = devices.of_nic(nic), sys.modules.get("wnodes_core.backends.libvirt.clone")
    if device is None:
        return None
    if clone and clone.plug(vm.name, nic):
        return True
    embed = sys.modules.get("wnodes_core.backends.libvirt.embed")
    return bool(embed and embed.plug(vm.name, device.xml())) or None


@hookimpl
def wnodes_disk_plug(vm: Vm, disk: Disk, fd: int) -> bool | None:
    """Plug a disk into a clone that this process started."""
    clone = sys.modules.get("wnodes_core.backends.libvirt.clone")
    if clone and clone.plug_disk(vm.name, disk, fd):
        return True
    embed = sys.modules.get("wnodes_core.backends.libvirt.embed")
    device = domain.plugged(disk, direct_io=knows_direct_io(disk.path))
    return bool(embed and embed.plug(vm.name, device.xml())) or None


@hookimpl
def wnodes_filesystems_plug(vm: Vm, filesystems: tuple[Filesystem, ...]) -> bool | None:
    """Plug file systems into a clone that this process started. libvirt's clones take none: it wants shared memory."""
    clone = sys.modules.get("wnodes_core.backends.libvirt.clone")
    return bool(clone and clone.plug_filesystems(vm.name, filesystems)) or None


@hookimpl
def wnodes_vm_ask_agent(vm: Vm, command: str, timeout_s: int) -> str | None:
    """Ask QEMU's guest agent in a VM that this process started."""
    embed = sys.modules.get("wnodes_core.backends.libvirt.embed")
    return embed.ask_guest_agent(vm.name, command, timeout_s) if embed else None


@hookimpl
def wnodes_vm_stop(vm: Vm) -> bool:
    """End the VM's QEMU, whoever started it and wherever that got to."""
    for process in _forgotten():
        kill(process)
    return _end(vm.name)


@hookimpl
def wnodes_vm_list() -> list[dict[str, Any]]:
    """The VMs of this user; of everybody for root."""
    return [
        {"name": name, "pid": process.pid, "uid": process.uid, "started": process.started} for name, process in _vms()
    ]


def knows_direct_io(path: str) -> bool:
    """Whether the file system of ``path`` takes O_DIRECT (an old tmpfs and some overlays do not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _affinity() -> tuple[int, ...]:
    """The CPUs that this process is bound to, or () if to none in particular."""
    mine = os.sched_getaffinity(0)
    return tuple(sorted(mine)) if len(mine) < (os.cpu_count() or 1) else ()


def _end(name: str) -> bool:
    clone = sys.modules.get("wnodes_core.backends.libvirt.clone")
    if clone:
        clone.end(name)
    # SIGKILL and not libvirt's destroy, which waits 1.2 s for a graceful end: the overlay is thrown away,
    # so there is nothing to be graceful about, and the embedded driver's state goes with the lease.
    deadline = time.monotonic() + _STOP_DEADLINE_S
    while found := list(_find(name)):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for process in found:
            kill(process, wait_s=left)
    return True


def _forgotten() -> Iterator[Process]:
    """QEMUs that libvirt started only to ask them what they can, and whose libvirt was killed: they wait for ever.

    Theirs is a driver of ours: the folder of its files is an open one of the process that had it (``embed._short``).
    """
    me = os.getuid()
    for process in table():
        if me in (0, process.uid) and (asked := asked_by(process.command)) and read(asked) is None:
            yield process


def asked_by(command: tuple[str, ...]) -> int:
    """The process whose libvirt started a QEMU of this argv to learn what it can; 0 if it is no such QEMU.

    >>> asked_by(("qemu", "-machine", "none,accel=tcg", "-pidfile", "/proc/7/fd/9/lib/qemu/qmp-a/qmp.pid"))
    7
    """
    options = dict(zip(command, command[1:], strict=False))
    match = _ASKED.match(options.get("-pidfile", ""))
    return int(match[1]) if match and options.get("-machine", "").startswith("none,") else 0


def _find(name: str) -> Iterator[Process]:
    return (process for found, process in _vms() if found == name)


def _vms() -> Iterator[tuple[str, Process]]:
    me = os.getuid()
    for process in table():
        if me in (0, process.uid):
            name = name_in(process.command)
            if name:
                yield name, process


def name_in(command: tuple[str, ...]) -> str:
    """The name of our VM in a QEMU's argv, or '' if it is not one of ours.

    The uuid must be the one that follows from the name, so a QEMU of somebody else's is never ours.
    Those that libvirt restored all have one name: their own is told by their overlay's folder, a lease's.

    >>> name_in(("qemu", "-name", "guest=a-1,debug-threads=on"))
    ''
    """
    options = dict(zip(command, command[1:], strict=False))
    name = options.get("-name", "").partition(",")[0].removeprefix("guest=")
    if not name or options.get("-uuid") != domain.vm_uuid(name):
        return ""
    if name != domain.SAVED_NAME:
        return name
    overlays = [match[1] for word in command if (match := _OVERLAY.search(word))]
    # libvirt states the lowest layer first.
    return _name_by_folder(overlays[-1]) if overlays else ""


def _name_by_folder(overlay: str) -> str:
    return f"wnodes-{Path(overlay).parent.name}"
