"""The mounts of second accounts in one VM: what wnodesd serves on our spare ports, and what the guest shows of it.

A mount is a port of the VM, a gateway of the account's on its host side and sshfs on its guest's. When a gateway ends
(killed, or out of memory) its mount answers ENOTCONN from then on, to whatever is running. The account's next command
gets that mount anew; the others, and who uses them, notice nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from wnodes_core.errors import HostError, LimitExceeded, RequestError, TransientError, from_dict
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.keeper_lease import Holding, read_line
from wnodes_core.model import Mount
from wnodes_core.plan import MOUNT_PORT, Plan
from wnodes_core.policy_become import Account
from wnodes_core.storage import sshfs

_STAGE, _SHOWN = "/run/wnodes/mounts/{}", "/run/wnodes/mounts/as.{}"  # below a folder that only the guest's root enters
_ASK_S = 60.0
# Take away what is left of a mount, and wait until its sshfs has let go of the port: it ends with its server, but a new
# server on the other side so soon that it does not see the old one's end would be taken for that. Words: name of the
# port, stage, shown.
CLEAR = """
set -u
while umount -l "$3" 2>/dev/null; do :; done
for each in /sys/class/virtio-ports/*; do
    test "$(cat "$each/name")" != "$1" || port=/dev/${each##*/}
done
for each in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    true <>"$port" && exit 0
    umount -f "$2"
    sleep 0.1
done 2>/dev/null
echo "its sshfs still holds port $1" >&2
exit 1
"""


@dataclass
class _Served:
    """An account, the port of each of its mounts, the end (a pidfd) of each gateway that wnodesd has told us of."""

    account: Account
    ports: list[int]
    ends: dict[int, int] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    begun: bool = False  # wnodesd has served it: from then on its ports are its own

    def wanting(self) -> list[int]:
        """The mounts, by number, that the guest does not show or whose gateway has ended."""
        poll = select.poll()
        for fd in self.ends.values():
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        there = {number for number in self.shown if self.ends.get(number) not in ended}
        return [number for number in range(len(self.ports)) if number not in there]

    def serves(self, numbers: Sequence[int], ends: Sequence[int]) -> None:
        """Gateways of these mounts have been started; ``ends`` are pidfds, or none from a wnodesd that sends none."""
        self.begun = True
        self.forget(numbers)
        self.ends.update(zip(numbers, ends, strict=False))

    def forget(self, numbers: Iterable[int]) -> None:
        """These mounts are there no more."""
        for number in numbers:
            self.shown.discard(number)
            if (fd := self.ends.pop(number, None)) is not None:
                os.close(fd)


class Serving:
    """The mounts of a VM's second accounts; one ``serve`` at a time is the caller's to see to."""

    def __init__(self, plan: Plan, channel: GuestChannel, holding: Holding) -> None:
        self._plan = plan
        self._channel = channel
        self._holding = holding
        self._served: dict[str, _Served] = {}

    def wanting(self, name: str) -> bool:
        """Whether an account that was served has to be served anew."""
        return bool(self._served[name].wanting())

    def shown(self, account: Account) -> list[tuple[str, str]]:
        """Of each mount of a served account: where it lies in the guest, and its target."""
        ports = self._served[account.name].ports
        return [(_shown(port), mount.target) for port, mount in zip(ports, account.mounts, strict=True)]

    def close(self) -> None:
        """Let go of the pidfds; the gateways are wnodesd's to end."""
        for each in self._served.values():
            each.forget(range(len(each.ports)))

    async def serve(self, name: str) -> Account:
        """The account as wnodesd sanctions it, with all of its mounts in the guest.

        Raises wnodesd's refusal, LimitExceeded, HostError, TransientError, NoProvider, ChannelLost.
        """
        question: dict[str, Any] = {**self._holding.hello, "op": "become", "account": name}
        served = self._served.get(name)
        only = served.wanting() if served and served.begun else None
        if served and only is not None:
            question["only"] = only
            for number in only:
                await self._clear(served, number)
        account, ends = await asyncio.to_thread(ask_wnodesd, self._holding.daemon, question, self._connected)
        served = self._served.setdefault(name, _Served(account, []))
        numbers = range(len(account.mounts)) if only is None else only
        served.serves(numbers, ends)
        await self._furnish(account, served, numbers)
        return account

    # on the host

    def _connected(self, account: Account) -> list[socket.socket]:
        """A port of our VM for each mount of the account's that is wanting. Blocks. Raises WnodesError."""
        served = self._served.get(account.name)
        if served is None or not served.begun:
            self._served.pop(account.name, None)
            served = self._served[account.name] = _Served(account, self._free_ports(account))
        elif (served.account.uid, served.account.mounts) != (account.uid, account.mounts):
            text = f"account {account.name!r}: a gateway of its mounts has ended, and other mounts are its own by now"
            raise RequestError(text, hint="it was changed, or the policy, since this job began: a new job has them")
        with ExitStack() as until_all:
            wanting = [served.ports[number] for number in served.wanting()]
            ports = [until_all.enter_context(socket.socket(socket.AF_UNIX)) for _ in wanting]
            for index, port in zip(wanting, ports, strict=True):
                try:
                    port.connect(self._plan.mount_socket(index))
                except OSError as error:
                    raise HostError(f"port {index} of the VM: {error.strerror}") from error
            until_all.pop_all()
        return ports

    def _free_ports(self, account: Account) -> list[int]:
        taken = {port for each in self._served.values() for port in each.ports}
        free = [port for port in range(len(self._plan.mounts), self._plan.served_ports) if port not in taken]
        if (count := len(account.mounts)) > len(free):
            text = f"account {account.name!r} has {count} mounts, and {len(free)} ports of this VM are free"
            raise LimitExceeded(text, hint="become_ports in the policy says how many a VM has")
        return free[:count]

    # in the guest

    async def _clear(self, served: _Served, number: int) -> None:
        port = MOUNT_PORT.format(served.ports[number])
        words = ["sh", "-c", CLEAR, "clear", port, _STAGE.format(port), _shown(served.ports[number])]
        await self._done(served.account, served.account.mounts[number], argv=words)

    async def _furnish(self, account: Account, served: _Served, numbers: Iterable[int]) -> None:
        """Account and mounts in the guest. Raises TransientError, NoProvider, ChannelLost."""
        user = {"name": account.name, "uid": account.uid, "gid": account.gid, "home": account.home}
        groups = [{"name": name, "gid": gid} for name, gid in account.groups.items()]
        await self._channel.request("setup", user={**user, "shell": account.shell}, groups=groups)
        for number in numbers:
            index, mount = served.ports[number], account.mounts[number]
            for step in sshfs.guest_steps(mount, {**self._channel.facts, "port": MOUNT_PORT.format(index)}):
                if "mount" in step:
                    step = {**step, "mount": {**step["mount"], "target": _shown(index)}}
                await self._done(account, mount, **step)
            served.shown.add(number)

    async def _done(self, account: Account, of: Mount, **step: Any) -> None:
        done = await self._channel.run(**step)
        if done.code:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise TransientError(f"account {account.name!r}: mount {of}: {said}")


def _shown(index: int) -> str:
    return _SHOWN.format(MOUNT_PORT.format(index))


def ask_wnodesd(
    daemon: str, question: dict[str, Any], ports: Callable[[Account], Sequence[socket.socket]]
) -> tuple[Account, list[int]]:
    """The account that wnodesd lets us become, its mounts served on ``ports(account)``; their gateways' pidfds. Blocks.

    Raises wnodesd's refusal, what ``ports`` raises, TransientError if wnodesd does not answer.
    """
    with ExitStack() as closing, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ASK_S)
        try:
            sock.connect(daemon)
            sock.sendall(json.dumps(question).encode() + b"\n")
            account = Account.from_dict(_ok(sock)[0]["account"])
            if account.mounts:
                given = [closing.enter_context(port) for port in ports(account)]
                socket.send_fds(sock, [b'{"ports":true}\n'], [port.fileno() for port in given])
            return account, _ok(sock)[1]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TransientError(f"wnodesd at {daemon} does not answer: {error}") from error


def _ok(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    reply, ends = read_line(sock)
    if not reply.get("ok"):
        raise from_dict(reply.get("error", {}))
    return reply, ends
