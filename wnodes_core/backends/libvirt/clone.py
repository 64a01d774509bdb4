"""Starting a clone of a template whose memory is mapped: QEMU is ours, without libvirt.

libvirt said once what the machine is (``argv.py``); here QEMU is started, loads the devices' state
and runs, with the memory mapped copy-on-write. Measured: 0.05 s to the guest's next instruction, where
libvirt alone takes 0.25 s to start any QEMU.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from wnodes_core.api import Disk, Filesystem, Nic, Process, Template, Vm, errors
from wnodes_core.backends.libvirt import argv, devices, domain
from wnodes_core.backends.libvirt.qmp import Monitor
from wnodes_core.tools import kill, read, read_tail, spawn

LOG = "qemu.log"
LOAD_TIMEOUT_S = 20.0
# As in qemu_x86_64.sh: the batch system's signals are for the user's program, not for its machine.
DEAF_TO = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM}
_VIRTIO_MEM = "virtiomem0"  # libvirt's alias of the first memory device
_MAX_ARGV = 1 << 20
_children: dict[str, Any] = {}
_monitors: dict[str, Monitor] = {}


def start(vm: Vm, template: Template, *, direct_io: bool = True) -> Process:
    """Start ``vm`` as a clone of ``template``; its guest runs on return. ``direct_io`` as in ``argv.Given``.

    Raises ImageError, TransientError, HostBusy; then no process of it is left.
    """
    with ExitStack() as stack:
        state = _opened(stack, template, f"{template.folder}/{template.files['state']}")
        # By its descriptor, and so for sure the file that is there now: one that is missing QEMU would make.
        memory = _opened(stack, template, template.memory, size=template.shape.memory_mib << 20)
        ours, theirs = socket.socketpair()
        stack.callback(theirs.close)
        monitor = Monitor(ours, vm.name)
        cleanup = stack.enter_context(ExitStack())
        cleanup.callback(monitor.close)
        given = argv.Given(theirs.fileno(), f"/proc/self/fd/{memory}", _kernel(template), direct_io)
        words = argv.adapt(_saved_argv(template), vm, template, given, domain.vm_uuid(vm.name))
        # QEMU inherits each under its own number.
        _children[vm.name] = _spawned(words, vm, (theirs.fileno(), state, memory))
        _monitors[vm.name] = monitor
        cleanup.pop_all()
    try:
        return _running(monitor, vm, template, state)
    except errors.WnodesError as error:
        pid = _children[vm.name].pid
        end(vm.name)
        raise _explained(error, vm, pid) from error


def _running(monitor: Monitor, vm: Vm, template: Template, state: int) -> Process:
    _load(monitor, vm, state)
    _fit(monitor, vm, template)
    monitor.ask("cont")
    process = read(_children[vm.name].pid)
    if process is None:
        raise errors.TransientError(f"VM {vm.name}: its QEMU has ended")
    return process


def _explained(error: errors.WnodesError, vm: Vm, pid: int) -> errors.WnodesError:
    """The error with QEMU's own last words, which say what is wrong."""
    said = read_tail(f"{vm.folder}/{LOG}", 2000).strip().replace(f" pid {pid}", "")
    kind = errors.HostBusy if "annot allocate memory" in said else type(error)
    return kind(f"{error.message}{': ' + said if said else ''}", hint=error.hint)


def _opened(stack: ExitStack, template: Template, path: str, *, size: int = 0) -> int:
    """A file of the template, open for reading until the stack ends; of exactly ``size`` bytes if that is given.

    Raises ImageError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        found = os.fstat(fd)
    except OSError as error:
        raise errors.ImageError(f"template {template.id}: {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode) or not found.st_size or found.st_size != (size or found.st_size):
        raise errors.ImageError(f"template {template.id}: {path}: {found.st_size} bytes: want {size or 'some'}")
    return fd


def _saved_argv(template: Template) -> list[str]:
    with ExitStack() as stack:
        fd = _opened(stack, template, f"{template.folder}/{template.files['argv']}")
        try:
            words = json.loads(os.read(fd, _MAX_ARGV))
        except ValueError as error:
            raise errors.ImageError(f"template {template.id}: its QEMU's argv is no JSON: {error}") from error
    if not isinstance(words, list):
        raise errors.ImageError(f"template {template.id}: its QEMU's argv is no list")
    return words


def _kernel(template: Template) -> str:
    return f"{template.folder}/{template.files['kernel']}" if "kernel" in template.files else ""


def _spawned(words: list[str], vm: Vm, fds: tuple[int, ...]) -> Any:
    # A child has the mask of the thread that starts it.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        with open(f"{vm.folder}/{LOG}", "ab") as log:
            return spawn(words, stderr=log.fileno(), pass_fds=fds, cwd=vm.folder)
    except OSError as error:
        raise errors.TransientError(f"VM {vm.name}: {error.filename}: {error.strerror}") from error
    except errors.CommandError as error:
        raise errors.TransientError(f"VM {vm.name}: its QEMU does not start: {error.stderr_tail}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _load(monitor: Monitor, vm: Vm, state: int) -> None:
    ignore_shared = {"capability": "x-ignore-shared", "state": True}
    monitor.ask("migrate-set-capabilities", timeout_s=LOAD_TIMEOUT_S, capabilities=[ignore_shared])
    monitor.ask("migrate-incoming", uri=f"fd:{state}")
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while (status := monitor.ask("query-status")["status"]) == "inmigrate":
        if time.monotonic() > deadline:
            raise errors.TransientError(f"VM {vm.name}: its state was not loaded within {LOAD_TIMEOUT_S:g} s")
        time.sleep(0.001)
    if status != "paused":  # as it was when it was saved
        raise errors.TransientError(f"VM {vm.name}: QEMU is {status!r} after loading: want paused")


def fit(vm: Vm, template: Template) -> bool:
    """Give a clone of this process the memory and the CPUs of its job; False if it is not ours, or gone."""
    monitor = _monitors.get(vm.name)
    if monitor is None:
        return False
    _fit(monitor, vm, template)
    return True


def _fit(monitor: Monitor, vm: Vm, template: Template) -> None:
    """Give the clone the memory and the CPUs of its job."""
    more = vm.memory_mib - template.shape.memory_mib
    if more > 0:
        path = f"/machine/peripheral/{_VIRTIO_MEM}"
        monitor.ask("qom-set", path=path, property="requested-size", value=more << 20)
    if len(set(vm.cpuset)) == vm.cpus:
        for cpu, each in zip(sorted(vm.cpuset), monitor.ask("query-cpus-fast"), strict=False):
            os.sched_setaffinity(each["thread-id"], {cpu})


def pause(name: str, paused: bool) -> bool:
    """Stop or resume a clone that this process started; False if it did not, or it is gone."""
    monitor = _monitors.get(name)
    if monitor is None:
        return False
    try:
        monitor.ask("stop" if paused else "cont")
    except errors.TransientError:
        return False
    return True


def plug(name: str, nic: Nic) -> bool:
    """Give a clone that this process started a NIC; False if it did not. Raises TransientError."""
    monitor = _monitors.get(name)
    if monitor is None:
        return False
    bus = _free_bus(monitor, name)
    netdev, device = devices.orders(nic, bus)
    if netdev:
        monitor.ask("netdev_add", **netdev)
    monitor.ask("device_add", **device)
    return True


def plug_disk(name: str, disk: Disk, fd: int) -> bool:
    """Give a clone that this process started a disk, by its open file; False if it did not. Raises TransientError."""
    monitor = _monitors.get(name)
    if monitor is None:
        return False
    bus = _free_bus(monitor, name)
    direct_io = _made_direct(fd)
    handed = monitor.ask("add-fd", fds=(fd,))["fdset-id"]
    storage, layer, device = devices.disk_orders(disk, f"/dev/fdset/{handed}", bus, direct_io=direct_io)
    monitor.ask("blockdev-add", **storage)
    monitor.ask("blockdev-add", **layer)
    monitor.ask("device_add", **device)
    return True


def plug_filesystems(name: str, filesystems: Sequence[Filesystem]) -> bool:
    """Give a clone that this process started these devices; False if it did not. Raises TransientError."""
    monitor = _monitors.get(name)
    if monitor is None:
        return False
    bus = _free_bus(monitor, name) if filesystems else ""
    for chardev, device in devices.filesystem_orders(filesystems, bus):
        monitor.ask("chardev-add", **chardev)
        monitor.ask("device_add", **device)
    return True


def _free_bus(monitor: Monitor, name: str) -> str:
    bus = devices.free_bus(monitor.ask("query-pci"))
    if not bus:
        raise errors.TransientError(f"VM {name}: its machine has no free slot")
    return bus


def _made_direct(fd: int) -> bool:
    """Whether the open file takes O_DIRECT, which it has then."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def end(name: str) -> None:
    """Reap a clone of this process, killing it if need be; its sockets go too."""
    child, monitor = _children.pop(name, None), _monitors.pop(name, None)
    if monitor:
        monitor.close()
    if child and child.poll() is None:
        process = read(child.pid)
        if process:
            kill(process)
        child.wait()
