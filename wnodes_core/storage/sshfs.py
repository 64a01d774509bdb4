"""Folders of the host in the guest: sshfs over a virtio-serial port, no network, no encryption.

On the host an ``sftp-server`` of OpenSSH runs as the job's user, so that every file has the right
owner by construction; Landlock keeps it beneath the mount's source. In the guest ``sshfs -o
passive`` speaks to it through the port ``org.wnodes.mount.N``. Contract of both programs:
sftp-server(8), sshfs(1), draft-ietf-secsh-filexfer-02 with OpenSSH's PROTOCOL extensions.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

from wnodes_core.api import Mount, Process, hookimpl
from wnodes_core.errors import HostError, MountDenied, NoProvider
from wnodes_core.storage import bundle, confine
from wnodes_core.tools import kill, read, spawn

wnodes_api = 1
NAME = "sshfs"
log = logging.getLogger(__name__)

SERVERS = (
    "/usr/lib/openssh/sftp-server",  # Debian, Ubuntu
    "/usr/libexec/openssh/sftp-server",  # EL, Fedora
    "/usr/lib/ssh/sftp-server",  # SUSE, Arch
    "/usr/libexec/sftp-server",
)
# What the dynamic loader and the name service read before the server serves: it looks its own
# uid up and ends if it has no account. Public on every node.
_NEEDS = tuple(
    [(path, confine.READ_AND_RUN) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/libexec/openssh")]
    + [(path, confine.READ) for path in ("/etc/ld.so.cache", "/etc/nsswitch.conf", "/etc/passwd", "/var/lib/sss/mc")]
    + [("/dev/null", confine.READ_FILE | confine.WRITE_FILE)]
)
# Figures behind the choice: docs/images.md. Names and attributes are believed for a second by
# the guest's kernel and for another by sshfs, so what the host writes is seen within two.
# allow_other: root mounts, the job's user reads. No default_permissions: the server *is* the
# user, so the host's own answer counts, ACLs included. A file that is removed while open is a
# .fuse_hidden name until it is closed (libfuse 3 has no option against it).
# 64 KiB a request instead of 32 is the most that sshfs takes (it cuts the rest off), and what a server
# before OpenSSH 8.5 answers in full: half the messages.
_LARGE = ("max_read=65536", "max_write=65536")
_OPTIONS = ("passive", "allow_other", "idmap=none", "dcache_timeout=1", "fsname=wnodes", *_LARGE)
# The kernel's own 128 KiB are two requests under way. Guest CPU of a sequential read under TCG, medians of
# 12 rounds in turn: 0.93 with 64 KiB requests, 0.81 with those and 4 MiB, of what 32 KiB and 1 MiB took
# (8 and 7 other rounds: 0.93 and 0.85, 0.87 and 0.73). Writing changes less than the noise.
_READ_AHEAD_KIB = 4096
_STAGES = "/run/wnodes/mounts"

_MOUNT_TIMEOUT_S = 60.0

_gateways: dict[int, Any] = {}  # pid -> Popen of this process: whoever started it reaps it


def find_server() -> str:
    """Path of OpenSSH's sftp-server. Raises HostError where the host has none."""
    for path in SERVERS:
        if os.access(path, os.X_OK):
            return path
    raise HostError("no sftp-server on this host", hint="install openssh-sftp-server (EL: openssh-server)")


@hookimpl
def wnodes_mount_usable() -> dict[str, str]:
    """Whether the host has a server; a client it lends to guests that have none."""
    try:
        find_server()
    except HostError as error:
        return {"provider": NAME, "problem": f"{error.message}; {error.hint}", "needs": ""}
    return {"provider": NAME, "problem": "", "needs": ""}


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Start the gateway and say how the guest mounts it."""
    if provider != NAME:
        return None
    check_source(mount)
    steps = guest_steps(mount, guest)  # may find that the guest cannot do it: nothing has been started yet
    notice = confinement(mount)
    process = _start_gateway(mount, socket_path, confined=not notice)
    return {
        "provider": NAME,
        "process": {"pid": process.pid, "started": process.started},
        "guest": steps,
        "notice": notice,
    }


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """End the gateway, in the process that started it or in any other of the user's."""
    return end_gateway(attachment) if attachment.get("provider") == NAME else None


def end_gateway(attachment: dict[str, Any]) -> bool:
    """End an attachment's process and reap it if it is ours. Raises HostError if it does not end."""
    pid, started = attachment["process"]["pid"], attachment["process"]["started"]
    child = _gateways.pop(pid, None)
    if child is not None:
        child.kill()
        child.wait()
        return True
    if not kill(Process(pid, 0, 0, started, "", ())):
        raise HostError(f"gateway {pid} does not end", hint="its file system hangs: see the kernel log")
    return True


def confinement(mount: Mount) -> str:
    """Words for the user where a gateway cannot be confined on this host, else ''."""
    notice = confine.usable()
    if notice:
        notice = f"mount {mount}: the gateway is not confined to its folder: {notice}"
        log.warning(notice)
    return notice


def check_source(mount: Mount) -> None:
    """Raises MountDenied."""
    try:
        fd = os.open(mount.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        text = f"mount {mount}: source {mount.source!r}: {error.strerror}: want a folder you can read"
        raise MountDenied(text) from error
    os.close(fd)


def _start_gateway(mount: Mount, socket_path: str, *, confined: bool) -> Process:
    argv = server_argv(mount)
    with closing(socket.socket(socket.AF_UNIX)) as port:
        port.connect(socket_path)
        child = _spawn_confined(argv, mount, port) if confined else _spawn(argv, port, None)
    return note_gateway(child)


def server_argv(mount: Mount) -> list[str]:
    """The server as it serves a mount on its stdin and stdout. Raises HostError where the host has none."""
    # The guest's kernel has applied the umask of the guest's process; the server adds none.
    words = ["-e", "-l", "ERROR", "-u", "000", "-d", mount.source, *(["-R"] if mount.read_only else [])]
    return [find_server(), *words]


def rules_of(mount: Mount) -> list[tuple[str, int]]:
    """All that a mount's server may open, as ``confine.make_ruleset`` takes it."""
    rights = confine.READ if mount.read_only else confine.ALL_BUT_RUN
    return [*_NEEDS, (find_server(), confine.READ_AND_RUN), (mount.source, rights)]


def note_gateway(child: Any) -> Process:
    """Know a started gateway, for ``end_gateway`` to reap it."""
    _gateways[child.pid] = child
    process = read(child.pid)
    if process is None:  # impossible: we have not waited for it, so its pid is still there
        raise HostError(f"gateway {child.pid} vanished")
    return process


def _spawn_confined(argv: Sequence[str], mount: Mount, port: socket.socket) -> Any:
    ruleset = confine.make_ruleset(rules_of(mount))
    try:
        return _spawn(argv, port, confine.restriction(ruleset))
    finally:
        os.close(ruleset)


def _spawn(argv: Sequence[str], port: socket.socket, before_exec: Any) -> Any:
    # stderr: the keeper's log.
    return spawn(argv, stdin=port.fileno(), stdout=port.fileno(), stderr=2, before_exec=before_exec)


def guest_steps(mount: Mount, guest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the keeper asks the guest's agent to run as root: arguments of ``GuestChannel.run``."""
    ours = not guest.get("sshfs")
    if ours and guest.get("machine", os.uname().machine) != os.uname().machine:
        raise NoProvider(f"mount {mount}: the image has no sshfs", hint="install sshfs in the image")
    program = bundle.argv() if ours else ["sshfs"]
    contains = bundle.knows(b"no_contain_symlinks") if ours else guest.get("sshfs_contains_symlinks")
    options = ",".join((*_OPTIONS, *(["no_contain_symlinks"] if contains else [])))
    stage = f"{_STAGES}/{guest['port']}"
    # ":" is the folder that the server starts in. One thread (-s): a second that writes to a port whose host has gone
    # waits for ever in the kernel (virtio_console), and the first for it, so the mount would hang and not end.
    argv = [*program, ":", stage, "-s", "-o", options]
    steps: list[dict[str, Any]] = [] if guest.get("fuse", True) else [{"argv": ["modprobe", "fuse"]}]
    shown = {"stage": stage, "target": mount.target, "read_only": mount.read_only, "read_ahead_kib": _READ_AHEAD_KIB}
    mounting = {"argv": argv, "port": guest["port"], "mount": shown, "timeout_s": _MOUNT_TIMEOUT_S}
    return [*steps, {**mounting, **({"files": bundle.files()} if ours else {})}]


def gateways() -> list[int]:
    """Pids of the gateways that this process has started and not ended."""
    return list(_gateways)


def reap() -> None:
    """Collect gateways that ended by themselves, so that no zombie stays."""
    for pid, child in list(_gateways.items()):
        with suppress(ProcessLookupError):
            if child.poll() is not None:
                _gateways.pop(pid, None)
