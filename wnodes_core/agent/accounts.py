"""Gateways of second accounts, root's part: each a process of the account's, in the journal before it serves.

``Accounts`` is one a node; all of it blocks. What is remembered is in the leases' journals, so that a wnodesd which
comes back ends what an earlier one started. A pid counts only with its birth, and only in the boot it was noted in.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from wnodes_core import command, processes
from wnodes_core.agent import homes, leases
from wnodes_core.agent.leases import Lease
from wnodes_core.errors import HostError, TransientError, WnodesError, from_dict
from wnodes_core.journal import Resource
from wnodes_core.model import Mount, Process
from wnodes_core.policy_become import Account

KIND = "account"  # of the resource in a lease's journal: one gateway each
READY_S = 15.0
_MAX_TOLD = 64 << 10


class Accounts:
    """Starts and ends them."""

    def __init__(self) -> None:
        self._children: dict[int, Any] = {}  # pid -> Popen: whoever started it reaps it

    def serve(self, lease: Lease, account: Account, numbers: Sequence[int], ports: Sequence[int]) -> list[Process]:
        """Serve the account's mounts of these numbers on connected sockets, one each; anew if they were served before.

        The gateways, in that order. Raises WnodesError; what was made until then is in the journal.
        """
        self.reap()
        if lease.keeper and not _same_view(lease.keeper):
            raise WnodesError(
                "wnodesd sees other files than the job does, and so would the gateways of other accounts",
                hint="wnodesd --print-drop-in files (docs/grid.md)",
            )
        for resource in replaced(lease, account, numbers):
            self.detach(resource)
            lease.journal.gone(resource)
        return [
            self._start(lease, account, name_of(account, number), account.mounts[number], port)
            for number, port in zip(numbers, ports, strict=True)
        ]

    def _start(self, lease: Lease, account: Account, name: str, mount: Mount, port: int) -> Process:
        resource = lease.journal.making(KIND, name, account=account.name, uid=account.uid, target=mount.target)
        with _pipes() as (go, told):
            argv = [sys.executable, "-I", "-m", "wnodes_core.agent.serve_as", str(port), json.dumps(asdict(mount))]
            ids = (account.uid, account.gid, tuple(account.groups.values()))
            child = command.spawn(argv, stdin=go[0], stdout=told[1], pass_fds=(port,), become=ids)
            self._children[child.pid] = child
            for fd in (go[0], told[1]):
                os.close(fd)
            return self._let_serve(lease, resource, child, go[1], told[0])

    def _let_serve(self, lease: Lease, resource: Resource, child: Any, go: int, told: int) -> Process:
        process = processes.read(child.pid)
        assert process  # we have not waited for it
        try:
            heard = _heard(told)
            if not heard.get("ok"):
                untold: dict[str, Any] = dict(HostError(f"gateway of {resource.name}: it ended").to_dict())
                raise from_dict(heard.get("error") or untold)
            if lease.keeper:  # so that the job's limits, and its end, are the gateway's
                homes.join(lease.keeper, [process])
            lease.journal.made(resource, pid=process.pid, started=process.started, boot_id=leases.boot_id())
            os.write(go, b"+")
        except BaseException:
            child.kill()
            raise
        return process

    def detach(self, resource: Resource) -> None:
        """End one gateway; one that has gone, or that never served, is fine. Raises WnodesError if it does not end."""
        if resource.data.get("boot_id") != leases.boot_id():
            return
        pid = int(resource.data["pid"])
        if not processes.kill(Process(pid, 0, int(resource.data["uid"]), int(resource.data["started"]), "", ())):
            raise WnodesError(f"gateway {pid} of account {resource.data['account']} survives SIGKILL")
        self.reap()

    def reap(self) -> None:
        """Collect what has ended, so that no zombie stays."""
        for pid, child in list(self._children.items()):
            if child.poll() is not None:
                self._children.pop(pid, None)


def name_of(account: Account, number: int) -> str:
    """Of the gateway of an account's mount, in a journal."""
    return f"{account.name}:{number}"


def replaced(lease: Lease, account: Account, numbers: Sequence[int]) -> list[Resource]:
    """The gateways that go before these mounts are served: their own, and all the account's if these are all it has."""
    names = {name_of(account, number) for number in numbers}
    known = of_account(lease, account.name)
    return [each for each in known if len(names) == len(account.mounts) or each.name in names]


def of_account(lease: Lease, name: str = "") -> list[Resource]:
    """The gateways that a lease's journal knows, of one account or of all."""
    found = [each for each in lease.journal.open_resources if each.kind == KIND]
    return [each for each in found if name in ("", each.data.get("account"))]


def _same_view(keeper: Process) -> bool:
    """Whether the job sees the node's files as we do: not with systemd's ProtectSystem=, or a ``/tmp`` of its own."""
    try:
        return os.readlink(f"/proc/{keeper.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt") and processes.alive(keeper)
    except OSError:
        return False


@contextmanager
def _pipes() -> Iterator[tuple[list[int], list[int]]]:
    """Two pipes, (reader, writer) each, closed at the end as far as they still are open."""
    pipes = [list(os.pipe2(os.O_CLOEXEC)) for _ in range(2)]
    try:
        yield pipes[0], pipes[1]
    finally:
        os.close(pipes[0][1])
        os.close(pipes[1][0])


def _heard(fd: int) -> dict[str, Any]:
    """The child's one line; {} if it ends without. Raises TransientError past ``READY_S``."""
    text, deadline = b"", time.monotonic() + READY_S  # the account might make its own process speak slowly
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not text.endswith(b"\n") and len(text) < _MAX_TOLD:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TransientError(f"a second account's gateway is not ready within {READY_S:g} s")
            if not (data := os.read(fd, _MAX_TOLD)):
                break
            text += data
    with suppress(ValueError):
        told = json.loads(text)
        return told if isinstance(told, dict) else {}
    return {}
