"""Saving a booted guest so that it can be cloned, in two ways.

``mapped``: the guest's memory is a file that QEMU shares; saving leaves it where it is and writes down
the devices alone (half a MiB). A clone maps the file privately, so pages are copied when they are written.
``saved``: libvirt's save image, memory and all, which every clone reads anew.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wnodes_core.api import Process, Template, Vm, errors
from wnodes_core.backends.libvirt import embed

SAVE_TIMEOUT_S = 120.0
ARGV, STATE, IMAGE, MEMORY, KERNEL = "argv.json", "state", "image", "memory", "kernel"
MACHINE = "machine.json"
_CHUNK = 1 << 20
_MAX_HEAD = 257 * 512


def save(vm: Vm, way: str, process: Process, end: Callable[[str], bool]) -> dict[str, Any]:
    """Write the guest's state down and end its QEMU; see ``wnodes_template_save``.

    Raises TransientError.
    """
    folder = Path(vm.folder)
    if way == "saved":
        embed.save(vm.name, str(folder / IMAGE), process)
        # A clone's domain has to be this machine, whatever part of its memory the guest turned out to use.
        (folder / MACHINE).write_text(json.dumps({"memory_mib": vm.memory_mib, "most_mib": vm.most_mib}))
        memory, files = "", {"image": IMAGE, "machine": MACHINE}
    else:
        files = _save_mapped(vm, process, folder)
        memory = str(folder / MEMORY)
    end(vm.name)
    for path in (*files.values(), *([memory] if memory else [])):
        _sync(folder / path)
    return {"memory": memory, "files": files}


def _save_mapped(vm: Vm, process: Process, folder: Path) -> dict[str, str]:
    argv = _argv_of(process.pid)
    embed.pause(vm.name, True)
    capability = {"capability": "x-ignore-shared", "state": True}
    embed.ask_monitor(vm.name, "migrate-set-capabilities", capabilities=[capability])
    with _receiving(folder / "save.sock", folder / STATE) as done:
        # libvirt's seccomp profile forbids QEMU to start programs, so the state goes to a socket of ours.
        embed.ask_monitor(vm.name, "migrate", uri=f"unix:{folder}/save.sock")
        _await_migration(vm.name)
        if not done.wait(SAVE_TIMEOUT_S):
            raise errors.TransientError(f"VM {vm.name}: its state did not arrive within {SAVE_TIMEOUT_S:g} s")
    # The file's own name goes with the domain; this one stays.
    os.link(_memory_of(argv), folder / MEMORY)
    (folder / ARGV).write_text(json.dumps(argv))
    if vm.boot is None:
        return {"argv": ARGV, "state": STATE}
    (folder / KERNEL).write_bytes(_head_of(vm.boot.kernel))
    return {"argv": ARGV, "state": STATE, "kernel": KERNEL}


def _head_of(kernel: str) -> bytes:
    """The part of a kernel that QEMU wants to see. A clone's guest has booted and never reads the rest.

    With kernel and initrd in full each clone had 20 MiB more of private memory and started.
    """
    with open(kernel, "rb") as file:
        head = file.read(_MAX_HEAD)
    # https://docs.kernel.org/arch/x86/boot.html: setup_sects, 0 stands for 4; then the code, of which a bit is left.
    return head[: ((head[0x1F1] or 4) + 2) * 512]


def _argv_of(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")]


def _memory_of(argv: list[str]) -> str:
    for word in argv:
        with suppress(ValueError, AttributeError):
            given = json.loads(word) if word.startswith("{") else {}
            if given.get("id") in ("pc.ram", "ram-node0") and "mem-path" in given:
                return str(given["mem-path"])
    raise errors.TransientError("the guest's memory is no file that could be kept", hint="warm: {way: saved}")


def _await_migration(name: str) -> None:
    deadline = time.monotonic() + SAVE_TIMEOUT_S
    while time.monotonic() < deadline:
        told = embed.ask_monitor(name, "query-migrate")
        if told.get("status") == "completed":
            return
        if told.get("status") in ("failed", "cancelled"):
            raise errors.TransientError(f"VM {name}: saving: {told.get('error-desc', told['status'])}")
        time.sleep(0.01)
    raise errors.TransientError(f"VM {name}: not saved within {SAVE_TIMEOUT_S:g} s")


@contextmanager
def _receiving(path: Path, into: Path) -> Iterator[threading.Event]:
    """Write what one client sends to ``path`` into a file; the event says that all of it is there."""
    done = threading.Event()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)

    def receive() -> None:
        connection, _ = server.accept()
        with connection, open(into, "wb") as file:
            while data := connection.recv(_CHUNK):
                file.write(data)
        done.set()

    thread = threading.Thread(target=receive, name="template-state", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def machine_of(template: Template) -> tuple[int, int]:
    """``memory_mib`` and ``most_mib`` of the machine that a ``saved`` template was. Raises ImageError."""
    path = Path(template.folder, template.files["machine"])
    try:
        told = json.loads(path.read_bytes())
        return int(told["memory_mib"]), int(told["most_mib"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.ImageError(f"template {template.id}: {path}: {error}") from error
