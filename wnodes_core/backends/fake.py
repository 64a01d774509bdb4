"""A backend whose VM is a local process: lifecycle tests in milliseconds, tutorials without KVM.

The "guest" is the real bootstrap (and through it the real agent) on one end of a socket pair; the
process (``fake_machine.py``) plays QEMU in between. The guest's own files (users, groups, homes) lie in
``guest`` beside the VM. Guest code never runs as root here: for root it becomes ``nobody``.

A template of it (way ``mapped``) is two small files; a clone is a fresh guest, which is brought to rest
before anybody can speak to it.

Faults come in the kernel command line: ``fault=never-boots``, ``fault=panics`` (after a hello),
``fault=cut-channel`` (the agent's channel closes after 64 KiB from the guest), ``fault=slow`` (1 s
before the guest starts), ``fault=dies`` (QEMU dies while it starts); of clones alone ``fault=clone-dies``
(as it starts), ``fault=clone-silent`` (its agent does not answer), ``fault=clone-garbage`` (nonsense).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wnodes_core.api import Disk, Filesystem, Nic, Process, Template, Vm, errors, hookimpl
from wnodes_core.tools import alive, kill, read, spawn, table, write_atomic

wnodes_api = 1
_MODULE = "wnodes_core.backends.fake_machine"
_WAY, _STATE, _MEMORY = "mapped", "state", "memory"
_MEMORY_BYTES = 4096
_children: dict[int, Any] = {}  # by pid: what this process started and will reap


@hookimpl
def wnodes_vm_probe(accel: str, folder: str) -> dict[str, Any]:
    """Claim to be TCG; there is no KVM in a fake."""
    if accel == "kvm":
        raise errors.NoKvm("KVM is demanded (accel: kvm), but the fake backend has none")
    return {"accel": "tcg", "notice": "", "qemu": "fake", "libvirt": "fake"}


@hookimpl
def wnodes_vm_start(vm: Vm) -> Process:
    """Start the process that plays the VM; its sockets listen on return."""
    running = next((process for process in _find(vm.name) if process.uid == os.getuid()), None)
    return running or _started(vm)


@hookimpl
def wnodes_template_ways(accel: str) -> Sequence[str]:
    """One way, whatever the accelerator."""
    return (_WAY,)


@hookimpl
def wnodes_template_host(accel: str) -> str | None:
    """A clone runs this very program, so its file says it all."""
    return f"fake {os.stat(__file__).st_mtime_ns} {accel}"


@hookimpl
def wnodes_template_start(vm: Vm, way: str) -> Process | None:
    """An ordinary fake guest."""
    return _started(vm) if way == _WAY else None


@hookimpl
def wnodes_template_save(vm: Vm, way: str) -> dict[str, Any] | None:
    """End the guest, and write files that stand for it."""
    if way != _WAY:
        return None
    if not wnodes_vm_stop(vm=vm):
        raise errors.TransientError(f"VM {vm.name}: it does not end")
    write_atomic(Path(vm.folder, _STATE), json.dumps({"fake": vm.name}).encode())
    write_atomic(Path(vm.folder, _MEMORY), os.urandom(_MEMORY_BYTES))
    return {"memory": f"{vm.folder}/{_MEMORY}", "files": {"state": _STATE}}


@hookimpl
def wnodes_vm_clone(vm: Vm, template: Template) -> Process | None:
    """A fresh guest at rest, if the template's files are whole."""
    if template.way != _WAY:
        return None
    try:
        saved = json.loads(Path(template.folder, template.files["state"]).read_text())
        size = os.stat(template.memory).st_size
    except (OSError, ValueError, KeyError) as error:
        raise errors.ImageError(f"template {template.id}: {error}") from error
    if size != _MEMORY_BYTES or not isinstance(saved, dict):
        raise errors.ImageError(f"template {template.id}: {size} bytes of memory: want {_MEMORY_BYTES}")
    return _started(vm, clone=True)


def _started(vm: Vm, *, clone: bool = False) -> Process:
    for disk in vm.disks:
        if not os.path.exists(disk.path):
            raise errors.TransientError(f"VM {vm.name}: disk {disk.path} does not exist")
    words = dict(word.partition("=")[::2] for word in (vm.boot.cmdline if vm.boot else "").split())
    channels = {channel.name: channel.path for channel in vm.channels if channel.path}
    facts = {"channels": channels, "console": vm.console, "fault": words.get("fault", ""), "clone": clone}
    ready, ready_child = os.pipe()
    # -I, as for every program of ours, so that nothing in the folder can be imported.
    argv = [sys.executable, "-I", "-m", _MODULE, vm.name, json.dumps(facts), str(ready_child)]
    try:
        child = spawn(argv, pass_fds=(ready_child,), cwd=vm.folder)
    finally:
        os.close(ready_child)
    with os.fdopen(ready, "rb") as pipe:
        process = read(child.pid) if pipe.read() else None
    _children[child.pid] = child
    if process is None:
        raise errors.TransientError(f"VM {vm.name}: the fake QEMU ended as it started (exit code {child.wait(10)})")
    return process


@hookimpl
def wnodes_vm_fit(vm: Vm, template: Template) -> bool:
    """A fake has neither memory nor CPUs of its own."""
    return any(_find(vm.name))


@hookimpl
def wnodes_vm_pause(vm: Vm, paused: bool) -> bool:
    """Stop or continue the process and its guest."""
    tree = [each for process in _find(vm.name) for each in _family(process)]
    for process in tree:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP if paused else signal.SIGCONT)
    return bool(tree)


@hookimpl
def wnodes_vm_plug(vm: Vm, nic: Nic) -> bool:
    """Note in ``nic.json`` beside the VM what it is plugged into."""
    Path(vm.folder, "nic.json").write_text(json.dumps(nic.to_dict()))
    return True


@hookimpl
def wnodes_disk_plug(vm: Vm, disk: Disk, fd: int) -> bool:
    """Note in ``disk.json`` beside the VM which file it is given."""
    found = os.fstat(fd)
    Path(vm.folder, "disk.json").write_text(json.dumps({"serial": disk.serial, "inode": found.st_ino}))
    return True


@hookimpl
def wnodes_filesystems_plug(vm: Vm, filesystems: tuple[Filesystem, ...]) -> bool:
    """Note in ``filesystems.json`` beside the VM what it is given."""
    if not filesystems:
        return True
    Path(vm.folder, "filesystems.json").write_text(json.dumps([asdict(each) for each in filesystems]))
    return True


@hookimpl
def wnodes_vm_stop(vm: Vm) -> bool:
    """Kill the process and all that descends from it."""
    gone = True
    for process in _find(vm.name):
        for each in reversed(_family(process)):
            gone = kill(each) and gone
    for pid in [pid for pid, child in _children.items() if child.poll() is not None]:
        del _children[pid]
    return gone


@hookimpl
def wnodes_vm_list() -> list[dict[str, Any]]:
    """The fake VMs of this user; of everybody for root."""
    return [{"name": name, "pid": p.pid, "uid": p.uid, "started": p.started} for name, p in _vms()]


def _find(name: str) -> Iterator[Process]:
    return (process for found, process in _vms() if found == name)


def _vms() -> Iterator[tuple[str, Process]]:
    for process in table():
        ours = process.command[1:4] == ("-I", "-m", _MODULE) and len(process.command) == 7
        if ours and os.getuid() in (0, process.uid) and alive(process) and not _is_guest(process):
            yield process.command[4], process


def _is_guest(process: Process) -> bool:
    """The forked guest has its parent's argv; it is told by that parent."""
    parent = read(process.parent)
    return parent is not None and parent.command == process.command


def _family(process: Process) -> list[Process]:
    """The process and its descendants; the fake QEMU is a subreaper, so none leaves the tree."""
    everybody = list(table())
    found = [process]
    for each in found:
        found += [other for other in everybody if other.parent == each.pid]
    return found
