"""Folders of the host in the guest: virtiofs, a device of the VM, served by a virtiofsd of the job's user.

The quickest way to a folder. A VM that is booted shares its memory with the server; a clone's memory is nobody's to
share, and what is plugged into it has a gateway that copies (``virtiofs_copy``). virtiofsd wants to be root, to act
for whatever user the guest names; here it is root of nothing but a user namespace in which only the job's user exists
(``virtiofs_exec``), so that the host's kernel refuses all others. Contract of the program: virtiofsd(1) of QEMU 5.0
to 7.2, and the README of its successor in Rust.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.api import Mount, Process, hookimpl
from wnodes_core.errors import HostError, NoProvider
from wnodes_core.storage import devices
from wnodes_core.storage.sshfs import end_gateway, note_gateway
from wnodes_core.storage.virtiofs_exec import PLACE
from wnodes_core.tools import kill, run, spawn, table

wnodes_api = 1
NAME = "virtiofs"

SERVERS = (
    "/usr/libexec/virtiofsd",  # EL, Fedora, Debian 13
    "/usr/lib/qemu/virtiofsd",  # Debian 12, Ubuntu
    "/usr/lib/virtiofsd",  # Arch
)
_NAMESPACES = "/proc/sys/user/max_user_namespaces"
_START_TIMEOUT_S = 10.0


def find_server() -> str:
    """Path of virtiofsd. Raises HostError where the host has none, or may not confine one."""
    with suppress(OSError):
        if Path(_NAMESPACES).read_text().strip() == "0":
            raise HostError("virtiofsd without root wants user namespaces", hint=f"sysctl {_NAMESPACES[10:]} is 0")
    for path in SERVERS:
        if os.access(path, os.X_OK):
            return path
    raise HostError("no virtiofsd on this host", hint="install virtiofsd (Debian 12: qemu-system-common)")


@hookimpl
def wnodes_mount_usable() -> dict[str, str]:
    """Whether the host has a server and the namespaces that confine it."""
    try:
        find_server()
    except HostError as error:
        return {"provider": NAME, "problem": f"{error.message}; {error.hint}", "needs": "plug"}
    return {"provider": NAME, "problem": "", "needs": "plug"}


@hookimpl
def wnodes_mount_equip(
    mount: Mount, index: int, folder: str, guest: dict[str, Any], provider: str, memory: int | None
) -> dict[str, Any] | None:
    """Start the gateway on a socket that QEMU is to call at."""
    if provider != NAME:
        return None
    devices.check(NAME, mount, guest)
    path = f"{folder}/fs{index}.sock"
    process = _start_gateway(mount, path, memory)
    return {
        "provider": NAME,
        "process": {"pid": process.pid, "started": process.started},
        "filesystem": devices.filesystem(NAME, mount, index, path),
        "notice": "",
    }


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Say how the guest mounts the device; its gateway was started with it."""
    if provider != NAME:
        return None
    return devices.attachment(NAME, mount, guest, "nosuid,nodev")


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """End the gateway, in the process that started it or in any other of the user's."""
    if attachment.get("provider") != NAME:
        return None
    if attachment.get("process") is None:  # the guest's half of it: the device has its own entry
        return True
    servers = _children(attachment["process"])
    end_gateway(attachment)
    for each in servers:  # one that copies has its server with it, unless that one's file system hangs
        if not kill(each):
            raise HostError(f"virtiofsd {each.pid} does not end", hint="its file system hangs: see the kernel log")
    with suppress(OSError):
        os.unlink(attachment["filesystem"]["source"])  # nobody calls twice
    return True


def _children(gateway: dict[str, int]) -> list[Process]:
    everybody = table()
    if not any((each.pid, each.started) == (gateway["pid"], gateway["started"]) for each in everybody):
        return []
    return [each for each in everybody if each.parent == gateway["pid"]]


def _start_gateway(mount: Mount, path: str, memory: int | None) -> Process:
    """A virtiofsd that serves who calls at ``path`` first; it ends with that one, or soon if nobody calls.

    ``memory`` as in ``wnodes_mount_equip``. Raises NoProvider where this host lets the user start none.
    """
    server = find_server()
    with socket.socket(socket.AF_UNIX) as listener:
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)  # nobody can call before it listens
        listener.listen(1)
        fd = listener.fileno()
        try:
            if memory is None:
                return _started(mount, "virtiofs_exec", [], server_argv(server, fd), [fd])
            from wnodes_core.storage import vhost_user, virtiofs_copy  # 2 ms that no other keeper needs

            if problem := vhost_user.usable():
                raise NoProvider(f"mount {mount}: {problem}")
            argv = server_argv(server, virtiofs_copy.SERVER_FD)
            return _started(mount, "virtiofs_copy", [fd, memory], argv, [fd, memory])
        except NoProvider:
            os.unlink(path)
            raise


def _started(mount: Mount, module: str, numbers: Sequence[int], server: Sequence[str], fds: Sequence[int]) -> Process:
    """One of our modules in namespaces of the user's, once it says that it serves. Raises NoProvider."""
    ours, theirs = socket.socketpair()
    with ours:
        log = os.dup(2)  # the keeper's
        try:
            argv = [*_confined(mount, module, [os.getpid(), *numbers, log]), *server]
            child = spawn(argv, stderr=theirs.fileno(), pass_fds=(*fds, log))
        finally:
            os.close(log)
            theirs.close()  # its end is the child's
        process = note_gateway(child)
        problem = _problem(ours)
    if problem:
        end_gateway({"process": {"pid": process.pid, "started": process.started}})
        raise NoProvider(f"mount {mount}: this host starts no {NAME} gateway: {problem}")
    return process


def _problem(starting: socket.socket) -> str:
    """What a gateway says until it is one: '' if all went well.

    Whether a user may make namespaces only trying tells: sysctls, AppArmor and limits have a say in it.
    """
    starting.settimeout(_START_TIMEOUT_S)
    said = b""
    with suppress(TimeoutError):
        while data := starting.recv(4096):
            said += data
            if said.endswith(b"\0"):
                return ""
        return said.decode(errors="replace").strip().rpartition("\n")[2] or "it ended"
    return f"nothing came of it in {_START_TIMEOUT_S:.0f} s"


def _confined(mount: Mount, module: str, numbers: Sequence[int]) -> list[str]:
    """What makes a namespace with one user in it, a module of ours there, and its arguments; the server's follow."""
    # Mounts that come later (automount) are seen, but where the seal must hold for them too.
    later = "private" if mount.read_only else "slave"
    alone = ["--user", "--mount", f"--propagation={later}", "--keep-caps"]
    alone += [f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
    become = [sys.executable, "-I", "-m", f"wnodes_core.storage.{module}", *map(str, numbers)]
    return ["unshare", *alone, "--", *become, "ro" if mount.read_only else "rw", mount.source]


def server_argv(server: str, fd: int) -> list[str]:
    """The server's own argv, in C or in Rust: it says which it is by the options that it knows.

    Their own sandboxes make namespaces of more users than we have, so ``chroot`` it is, which the one in Rust wants to
    be called root for: our own sandbox must do there. The limit of open files is the keeper's: raising it wants root.
    """
    if knows_rust_options(server):
        return [server, f"--fd={fd}", f"--shared-dir={PLACE}", "--sandbox=none", "--rlimit-nofile=0"]
    options = f"sandbox=chroot,source={PLACE},cache=auto,no_posix_lock"
    return [server, f"--fd={fd}", "--rlimit-nofile=0", "-o", options]


def knows_rust_options(server: str) -> bool:
    """Whether a virtiofsd is the one in Rust."""
    return "--shared-dir" in run([server, "--help"], check=False, timeout_s=10).text
