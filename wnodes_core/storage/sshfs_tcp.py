"""Folders of the host in the guest: sshfs over the VM's own NIC, no encryption.

The same server and client as ``sshfs``, joined by a TCP connection in place of a virtio-serial port. Who calls
whom follows from who can be called: in a network of kind bridge or ovs the node calls the guest, so that no port
of the node is opened for anybody; QEMU's own network stack can only be called from inside, so there the guest
calls the gateway, on the node's loopback. ``tcp_meet`` tells the VM from everybody else who is there.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from wnodes_core.api import Mount, Process, hookimpl
from wnodes_core.errors import HostError, NoProvider
from wnodes_core.storage import sshfs, tcp_meet
from wnodes_core.tools import clean_environment, spawn

wnodes_api = 1
NAME = "sshfs-tcp"
_PATIENCE_S = 60
# Where the guest waits for its node: below the ephemeral ports, one a mount.
_FIRST_PORT = 30574


@hookimpl
def wnodes_mount_usable() -> dict[str, str]:
    """Whether the host has a server."""
    return {**sshfs.wnodes_mount_usable(), "provider": NAME, "needs": "network"}


@hookimpl
def wnodes_mount_attach(mount: Mount, socket_path: str, guest: dict[str, Any], provider: str) -> dict[str, Any] | None:
    """Start the gateway and say how the guest meets it."""
    if provider != NAME:
        return None
    sshfs.check_source(mount)
    nic = guest.get("nic") or {}
    if nic.get("kind") not in ("user", "tap") or not nic.get("node"):
        raise NoProvider(f"mount {mount}: the VM has no network in which it meets its node")
    *before, mounting = sshfs.guest_steps(mount, guest)
    notice = sshfs.confinement(mount)
    words = [secrets.token_hex(tcp_meet.SECRET_BYTES) for _ in range(2)]
    told: dict[str, Any] = {"secrets": words, "seconds": _PATIENCE_S, "argv": sshfs.server_argv(mount)}
    told["rules"] = None if notice else sshfs.rules_of(mount)
    ends, listener = _ends(nic, guest["port"])
    with listener or nullcontext():
        process = _start({**told, **ends["host"]}, listener)
    here = ends["guest"]
    program = ["/usr/bin/python3", "-I", "-c", Path(tcp_meet.__file__).read_text()]
    meeting = [here["how"], here["address"], str(here["port"]), *words, str(_PATIENCE_S)]
    mounting.pop("port")
    mounting["argv"] = [*program, *meeting, *mounting["argv"]]
    return {
        "provider": NAME,
        "process": {"pid": process.pid, "started": process.started},
        "guest": [*before, mounting],
        "notice": notice,
    }


@hookimpl
def wnodes_mount_detach(attachment: dict[str, Any]) -> bool | None:
    """End the gateway, whether it met its guest or not."""
    return sshfs.end_gateway(attachment) if attachment.get("provider") == NAME else None


def _ends(nic: dict[str, Any], port: str) -> tuple[dict[str, Any], socket.socket | None]:
    """What each end does, and the socket on which the host's listens. Raises HostError, NoProvider."""
    if nic["kind"] == "user":
        try:
            listener = tcp_meet.listen("127.0.0.1", 0)
        except OSError as error:
            raise HostError(f"no port on 127.0.0.1: {error.strerror}") from error
        number = listener.getsockname()[1]
        host = {"how": "wait", "listener": listener.fileno()}
        return {"host": host, "guest": {"how": "call", "address": nic["node"], "port": number}}, listener
    local = next((each["source"] for each in nic["routes"] if each["to"] == f"{nic['node']}/32"), "")
    if not local:
        raise NoProvider("the node has no way of its own to the VM")
    place = {"address": local, "port": _FIRST_PORT + int(port.rpartition(".")[2])}
    return {"host": {"how": "call", **place}, "guest": {"how": "wait", **place}}, None


def _start(told: dict[str, Any], listener: socket.socket | None) -> Process:
    reader, writer = os.pipe()
    try:
        argv = [sys.executable, "-I", "-m", "wnodes_core.storage.tcp_gateway"]
        passed = [listener.fileno()] if listener else []
        # stderr: the keeper's log.
        child = spawn(argv, stdin=reader, stderr=2, environ=clean_environment(), pass_fds=passed)
        process = sshfs.note_gateway(child)
        os.write(writer, json.dumps(told).encode())  # shorter than a pipe's room
    finally:
        os.close(reader)
        os.close(writer)
    return process
