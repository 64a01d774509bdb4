"""Starting a clone of a template whose memory is mapped: QEMU is ours, without libvirt.

libvirt said once what the machine is (``argv.py``); here QEMU is started, loads the devices' state
and runs, with the memory mapped copy-on-write. Measured: 0.06 s to the guest's next instruction, where
libvirt alone takes 0.25 s to start any QEMU.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from wnodes_core.api import Process, Template, Vm, errors
from wnodes_core.backends.libvirt import argv, domain
from wnodes_core.backends.libvirt.qmp import Monitor
from wnodes_core.tools import kill, read, read_tail, spawn

LOG = "qemu.log"
LOAD_TIMEOUT_S = 20.0
# As in qemu_x86_64.sh: the batch system's signals are for the user's program, not for its machine.
DEAF_TO = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM}
_VIRTIO_MEM = "virtiomem0"  # libvirt's alias of the first memory device
_children: dict[str, Any] = {}
_monitors: dict[str, Monitor] = {}


def start(vm: Vm, template: Template) -> Process:
    """Start ``vm`` as a clone of ``template``; its guest runs on return.

    Raises ImageError, TransientError, HostBusy; then no process of it is left.
    """
    folder = Path(template.folder)
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.callback(theirs.close)
        state = os.open(folder / template.files["state"], os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, state)
        parts = argv.Parts(theirs.fileno(), template.memory)
        saved = json.loads((folder / template.files["argv"]).read_text())
        words = argv.adapt(saved, vm, template, parts, domain.vm_uuid(vm.name))
        monitor = Monitor(ours, vm.name)
        child = _spawned(words, vm, (theirs.fileno(), state))
    # QEMU has inherited the state under the same number.
    _children[vm.name], _monitors[vm.name] = child, monitor
    try:
        _load(monitor, vm, state)
        _fit(monitor, vm, template)
        monitor.ask("cont")
        process = read(child.pid)
        if process is None:
            raise errors.TransientError(f"VM {vm.name}: its QEMU has ended")
    except errors.WnodesError as error:
        end(vm.name)
        said = read_tail(f"{vm.folder}/{LOG}", 2000).strip()
        kind = errors.HostBusy if "annot allocate memory" in said else type(error)
        raise kind(f"{error.message}{': ' + said if said else ''}", hint=error.hint) from error
    return process


def _spawned(words: list[str], vm: Vm, fds: tuple[int, ...]) -> Any:
    log = os.open(f"{vm.folder}/{LOG}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    # A child has the mask of the thread that starts it.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        return spawn(words, stderr=log, pass_fds=fds, cwd=vm.folder)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        os.close(log)


def _load(monitor: Monitor, vm: Vm, state: int) -> None:
    ignore_shared = {"capability": "x-ignore-shared", "state": True}
    monitor.ask("migrate-set-capabilities", timeout_s=LOAD_TIMEOUT_S, capabilities=[ignore_shared])
    monitor.ask("migrate-incoming", uri=f"fd:{state}")
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while (status := monitor.ask("query-status")["status"]) == "inmigrate":
        if time.monotonic() > deadline:
            raise errors.TransientError(f"VM {vm.name}: its state was not loaded within {LOAD_TIMEOUT_S:g} s")
        time.sleep(0.002)
    if status != "paused":  # as it was when it was saved
        raise errors.TransientError(f"VM {vm.name}: QEMU is {status!r} after loading: want paused")


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
