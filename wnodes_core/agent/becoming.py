"""A job acts as a second account in its VM: who may, and the gateways that carry it.

Asked by the keeper on a connection of its own: ``{"op": "become", "lease", "token", "account"}``. We say what the
account is and how many mounts it has; the keeper answers with that many open sockets, connected to spare ports of its
VM, so that root follows no path of a user's; we start the gateways on them and say so, with a pidfd of each, by which
the keeper learns of their ends. ``only: [number]`` asks for some of the mounts anew, the others' gateways stay. Every
question is decided anew, by the lease's own record: neither uid nor mounts are ever the keeper's word.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import Any

from wnodes_core import processes
from wnodes_core.agent.accounts import of_account, replaced
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease, State
from wnodes_core.agent.protocol import Connection
from wnodes_core.errors import BadRequest, LimitExceeded, RequestError, WnodesError
from wnodes_core.model import Process
from wnodes_core.policy_become import Account

PORTS_S = 10.0  # for the keeper to connect to its own VM
_AT_ONCE = 4  # questions of one lease under way


class Becoming:
    """The ``become`` operation."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._under_way: dict[str, int] = {}

    async def become(self, connection: Connection, message: dict[str, Any]) -> None:
        """Serve a second account to a lease's VM.

        Raises RequestError for anybody but the lease's keeper, and for what policy does not sanction.
        """
        lease = self._asking(connection, message)
        if self._under_way.get(lease.id, 0) >= _AT_ONCE:
            raise LimitExceeded(f"lease {lease.id}: more than {_AT_ONCE} accounts asked for at once")
        self._under_way[lease.id] = self._under_way.get(lease.id, 0) + 1
        try:
            account = await self._decided(lease, message.get("account"))
            numbers = _numbers(account, message.get("only"))
            gateways = await self._served(connection, lease, account, numbers)
            await self._noted(lease, account, numbers if "only" in message else [])
            await _told(connection, gateways)
        finally:
            self._under_way[lease.id] -= 1
            if not self._under_way[lease.id]:
                del self._under_way[lease.id]

    def _asking(self, connection: Connection, message: dict[str, Any]) -> Lease:
        lease = self._daemon.leases.get(str(message.get("lease")))
        peer = connection.peer
        # A token proves a keeper; the process shows that it is the one which holds.
        ours = lease is not None and peer.uid == lease.job.uid and lease.token_fits(message.get("token"))
        if lease is None or not ours or not lease.keeper or lease.keeper.pid != peer.pid:
            log.warning("foreign become", extra={"event": "denied", "uid": peer.uid})
            raise RequestError(f"lease {str(message.get('lease'))[:40]!r}: not yours to ask for an account")
        self._daemon.refuse_if_over(lease)
        if lease.state is not State.RUNNING:
            raise RequestError(f"lease {lease.id}: its keeper does not hold it")
        return lease

    async def _decided(self, lease: Lease, name: object) -> Account:
        try:
            hook = await self._daemon.quick(self._daemon.parts.hook_for, lease.job.lrms)
            account: Account = await self._daemon.slow(
                self._daemon.parts.sanctioned, lease.job, name, self._daemon.settings, hook
            )
        except WnodesError as error:
            facts = {"event": "denied", "lease": lease.id, "job": lease.job.key, "uid": lease.job.uid}
            log.warning("become: %s", error.message, extra={**facts, "account": str(name)[:70]})
            raise
        return account

    async def _served(
        self, connection: Connection, lease: Lease, account: Account, numbers: list[int]
    ) -> list[Process]:
        """The gateways, in the order of ``numbers``."""
        if account.mounts:
            connection.hold_back()
        if not await connection.send({"ok": True, "account": account.to_dict()}):
            raise RequestError("the keeper does not read")
        fds = await connection.handed(len(numbers), PORTS_S) if account.mounts else []
        try:
            for fd in fds:
                _check_port(fd)
            return await self._daemon.whole(self._started(lease, account, numbers, fds)) if fds else []
        finally:
            _close(fds)

    async def _started(self, lease: Lease, account: Account, numbers: list[int], fds: list[int]) -> list[Process]:
        ports = [os.dup(fd) for fd in fds]  # the asker may be gone before a thread has used them
        try:
            async with lease.lock:
                self._daemon.refuse_if_over(lease)
                kept = len(of_account(lease)) - len(replaced(lease, account, numbers))
                if kept + len(ports) > lease.request.spare_mounts:
                    raise LimitExceeded(
                        f"account {account.name!r}: its {len(ports)} mounts find no free port in the VM",
                        hint="become_ports in the policy says how many there are",
                    )
                serve = self._daemon.accounts.serve
                gateways: list[Process] = await self._daemon.slow(serve, lease, account, numbers, ports)
                return gateways
        finally:
            _close(ports)

    async def _noted(self, lease: Lease, account: Account, again: list[int]) -> None:
        facts = {"uid": lease.job.uid, "account": account.name}
        if account.name not in lease.accounts:
            lease.accounts = {**lease.accounts, account.name: account.uid}
            await self._daemon.save(lease)
            self._daemon.say(lease, "become", **facts)
        elif again:
            facts |= {"event": "again", "lease": lease.id, "job": lease.job.key}
            log.warning("account %s: gateways of mounts %s served anew", account.name, again, extra=facts)


def _numbers(account: Account, only: object) -> list[int]:
    """Which of the account's mounts are asked for; all, if the keeper names none. Raises RequestError."""
    all_of_it = range(len(account.mounts))
    if only is None:
        return list(all_of_it)
    if isinstance(only, list) and only and all(type(each) is int and each in all_of_it for each in only):
        return list(dict.fromkeys(only))
    raise RequestError(f"account {account.name!r}: it has {len(all_of_it)} mounts, and those are not {str(only)[:70]}")


async def _told(connection: Connection, gateways: list[Process]) -> None:
    """The last word, with the end of each gateway: a file that is readable from then on."""
    ends: list[int] = []
    try:
        for each in gateways:
            end = processes.open_pidfd(each)
            ends.append(os.eventfd(1) if end is None else end)  # it has come already
        await connection.send({"ok": True, "served": len(ends)}, ends)
    finally:
        _close(ends)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _check_port(fd: int) -> None:
    """Raises BadRequest for what is no connected Unix stream socket."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.getpeername()
            if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
                return
    raise BadRequest("become: want connected Unix sockets, one a mount")
