"""The keeper's part in a second account, against a guest and a wnodesd that say what they like."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.errors import RequestError, WnodesError
from wnodes_core.guest import frames
from wnodes_core.guest.channel import Done
from wnodes_core.keeper_become import ENTER, Accounts, Wish
from wnodes_core.keeper_serving import ask_wnodesd
from wnodes_core.model import Mount
from wnodes_core.policy_become import Account

ALICE = Account("alice", 2001, 2001, "/home/alice", "/bin/sh", {"alice": 2001}, (Mount("/srv/alice", "/home/alice"),))
STREAM = frames.GUEST_BIT | 1


class Channel:
    """A guest that is asked, and answers when the test says so."""

    def __init__(self) -> None:
        self.facts = {"sshfs": True}
        self.sent: list[tuple[int, int, Any]] = []
        self.handlers: dict[int, Any] = {}
        self.asked: list[Any] = []
        self.code = 0
        self.lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def adopt_stream(self, stream: int, handler: Any) -> None:
        self.handlers[stream] = handler

    def new_stream(self, handler: Any) -> int:
        self.handlers[len(self.handlers) + 1] = handler
        return len(self.handlers)

    def drop_stream(self, stream: int) -> None:
        self.handlers.pop(stream, None)

    def send(self, kind: int, sub: int, stream: int, payload: bytes) -> None:
        self.sent.append((kind, stream, json.loads(payload)))

    async def request(self, verb: str, **args: Any) -> dict[str, Any]:
        self.asked.append((verb, args))
        return {}

    async def run(self, argv: list[str], **args: Any) -> Done:
        self.asked.append((argv, args))
        return Done(self.code, b"", b"no fuse here")

    async def until(self, kind: int) -> tuple[int, Any]:
        for _ in range(500):
            for found, stream, message in self.sent:
                if found == kind:
                    return stream, message
            await asyncio.sleep(0.01)
        raise AssertionError(f"no frame {kind} in {self.sent}")


def plan(folder: Path, spare: int = 1) -> Any:
    mounts = (Mount("/work", "/work"), Mount("/work/in", "/work/in"))
    return SimpleNamespace(mounts=mounts, served_ports=len(mounts) + spare, mount_socket=lambda index: f"{folder}/mount{index}.sock")


class Wnodesd:
    """Answers each question with the next of ``replies``; keeps what it was asked and handed."""

    def __init__(self, folder: Path, *replies: Any) -> None:
        self.path, self.replies, self.asked, self.fds = f"{folder}/d.sock", list(replies), [], []  # type: ignore[var-annotated]
        self.ends: list[int] = []  # of the gateways that it starts
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, suppress(OSError):  # an asker that found no port has hung up
                self.asked.append(json.loads(sock.makefile("rb").readline()))
                first, *rest = self.replies
                sock.sendall(json.dumps(first).encode() + b"\n")
                if rest:
                    _, fds, _, _ = socket.recv_fds(sock, 100, 10)
                    self.fds += [socket.socket(fileno=fd) for fd in fds]
                    ends, self.ends = self.ends, []
                    socket.send_fds(sock, [json.dumps(rest[0]).encode() + b"\n"], ends)

    @property
    def holding(self) -> Any:
        return SimpleNamespace(daemon=self.path, hello={"op": "hold", "lease": "l", "token": "t"})

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for each in self.fds:
            each.close()


@pytest.fixture
def wnodesd(tmp_path: Path) -> Iterator[Callable[..., Wnodesd]]:
    made: list[Wnodesd] = []

    def make(*replies: Any) -> Wnodesd:
        made.append(Wnodesd(tmp_path, *replies))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """The VM's first spare ones."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for number, listener in enumerate((first, second), 2):
            listener.bind(f"{tmp_path}/mount{number}.sock")
            listener.listen()
        yield [first, second]


GRANTED = {"ok": True, "account": ALICE.to_dict()}


def wish(*argv: str, **more: Any) -> dict[str, Any]:
    return {"verb": "become", "argv": ["wnodes-run-as", *argv], "cwd": "/work/x", "umask": 0o27, "environ": {"LANG": "C", "LD_PRELOAD": "x"}, **more}


@pytest.mark.parametrize("request_", [
    wish(), wish("alice"), wish("--help"), wish("alice", "--"), {}, {"argv": 7}, {"argv": []}, wish("alice", "id", umask="x"),
    wish("alice", "id", umask=1e999), wish("alice", "id", environ=7), wish("alice", "a\0b"), wish("alice", "id", cwd="\0"),
])  # fmt: skip
def test_what_a_guest_says_wrongly_is_answered_with_the_usage(request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Wish.parse(request_)


def test_a_wish_passes_few_variables_on_and_none_that_loads_code() -> None:
    found = Wish.parse(wish("alice", "--", "sh", "-c", "--"))
    assert (found.account, found.argv, found.umask, found.environ) == ("alice", ("sh", "-c", "--"), 0o27, {"LANG": "C"})


def test_a_command_is_ordered_with_the_account_s_mounts_and_without_the_pilot_s(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    daemon = wnodesd(GRANTED, {"ok": True})

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path), channel, daemon.holding)  # type: ignore[arg-type]
        accounts.opened(STREAM, wish("alice", "--", "id", "-u"))
        stream, order = await channel.until(frames.OPEN)
        words = order["argv"][order["argv"].index("wnodes-run-as") + 1 :]
        assert words == ["2", "/work/in", "/work", "1", "/run/wnodes/mounts/as.org.wnodes.mount.2", "/home/alice",
                         "2001", "2001", "2001", "", "id", "-u"]  # fmt: skip
        assert order["stdio_of"] == STREAM and order["umask"] == 0o27
        assert order["environ"] == {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C", "HOME": "/home/alice",
                                    "USER": "alice", "LOGNAME": "alice", "SHELL": "/bin/sh"}  # fmt: skip
        channel.handlers[stream](frames.EXIT, 0, stream, b'{"code": 3, "more": "x"}')
        assert await channel.until(frames.EXIT) == (STREAM, {"code": 3})
        assert [step[1]["mount"]["target"] for step in channel.asked if "mount" in step[1]] == ["/run/wnodes/mounts/as.org.wnodes.mount.2"]
        channel.sent.clear()
        accounts.opened(STREAM, wish("alice", "true"))  # the second time nobody is asked
        await channel.until(frames.OPEN)
        await accounts.stop()

    asyncio.run(run())
    assert daemon.asked == [{"op": "become", "lease": "l", "token": "t", "account": "alice"}]
    assert len(daemon.fds) == 1 and daemon.fds[0].getpeername() == f"{tmp_path}/mount2.sock"


def test_whoever_is_gone_takes_the_command_along(tmp_path: Path, port: Any, wnodesd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("wnodes_core.keeper_become._GRACE_S", 0.05)
    daemon = wnodesd(GRANTED, {"ok": True})

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path), channel, daemon.holding)  # type: ignore[arg-type]
        accounts.opened(STREAM, wish("alice", "sleep"))
        await channel.until(frames.OPEN)
        channel.handlers[STREAM](frames.CONTROL, 0, STREAM, b'{"close":true}')
        await channel.until(frames.EXIT)
        assert [message for kind, _, message in channel.sent if kind == frames.CONTROL] == [{"signal": 15, "to": "group"}, {"close": True}]

    asyncio.run(run())


async def refused(accounts: Accounts, channel: Channel, account: str = "alice") -> str:
    accounts.opened(STREAM, wish(account, "id"))
    _, ending = await channel.until(frames.EXIT)
    assert ending["code"] == 126 and not [kind for kind, *_ in channel.sent if kind == frames.OPEN]
    channel.sent.clear()
    return str(ending["error"])


def test_refusals_reach_the_caller_and_are_asked_anew(tmp_path: Path, wnodesd: Any) -> None:
    no = {"ok": False, "error": {"kind": "RequestError", "message": "account 'alice': no", "hint": "may_become: [alice]"}}
    daemon = wnodesd(no)

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path), channel, daemon.holding)  # type: ignore[arg-type]
        assert await refused(accounts, channel) == "account 'alice': no (may_become: [alice])"
        await refused(accounts, channel)
        daemon.replies[:] = [GRANTED, {"ok": True}]
        assert "port 2 of the VM" in await refused(accounts, channel), "its QEMU has gone"
        without = Accounts(plan(tmp_path, spare=0), channel, daemon.holding)  # type: ignore[arg-type]
        assert "become_ports" in await refused(without, channel)
        embedded = Accounts(plan(tmp_path), channel, None)  # type: ignore[arg-type]
        assert "there is no wnodesd" in await refused(embedded, channel)

    asyncio.run(run())
    assert len(daemon.asked) == 4


def test_a_guest_that_cannot_mount_runs_nothing(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    daemon = wnodesd(GRANTED, {"ok": True})

    async def run() -> None:
        channel = Channel()
        channel.code = 1
        accounts = Accounts(plan(tmp_path), channel, daemon.holding)  # type: ignore[arg-type]
        assert "no fuse here" in await refused(accounts, channel)

    asyncio.run(run())


BOTH = replace(ALICE, mounts=(*ALICE.mounts, Mount("/srv/data", "/data")))
TWICE = ({"ok": True, "account": BOTH.to_dict()}, {"ok": True})


async def ordered(accounts: Accounts, channel: Channel) -> None:
    channel.sent.clear()
    accounts.opened(STREAM, wish("alice", "true"))
    await channel.until(frames.OPEN)


def test_a_gateway_that_has_ended_is_asked_for_anew_and_no_other(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    daemon = wnodesd(*TWICE)
    ends = daemon.ends = [os.eventfd(0), os.eventfd(0)]

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path, spare=2), channel, daemon.holding)  # type: ignore[arg-type]
        for _ in range(2):
            await ordered(accounts, channel)
        assert len(daemon.asked) == 1
        channel.asked.clear()
        os.eventfd_write(ends[1], 1)
        await ordered(accounts, channel)
        (clearing, _), (setup, _), (mounting, how) = channel.asked
        assert clearing[4:] == [f"{word}org.wnodes.mount.3" for word in ("", "/run/wnodes/mounts/", "/run/wnodes/mounts/as.")]
        assert (setup, mounting[0], how["port"]) == ("setup", "sshfs", "org.wnodes.mount.3")
        await ordered(accounts, channel)  # of the new one no end is known: it counts as alive
        before = len(os.listdir("/proc/self/fd"))
        await accounts.stop()
        assert len(os.listdir("/proc/self/fd")) == before - 1, "the first one's end"

    asyncio.run(run())
    for fd in ends:
        os.close(fd)
    assert [each.get("only") for each in daemon.asked] == [None, [1]]
    assert [each.getpeername()[-11:] for each in daemon.fds] == ["mount2.sock", "mount3.sock", "mount3.sock"]


def test_a_port_that_its_sshfs_still_holds_is_not_handed_out(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    daemon = wnodesd(*TWICE)
    ends = daemon.ends = [os.eventfd(0), os.eventfd(1)]

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path, spare=2), channel, daemon.holding)  # type: ignore[arg-type]
        await ordered(accounts, channel)
        channel.sent.clear()
        channel.code = 1
        assert "mount /srv/data:/data: no fuse here" in await refused(accounts, channel)
        assert len(daemon.asked) == 1
        channel.code = 0
        await ordered(accounts, channel)
        await accounts.stop()

    asyncio.run(run())
    for fd in ends:
        os.close(fd)
    assert [each.get("only") for each in daemon.asked] == [None, [1]]


def test_mounts_that_are_others_by_now_are_not_mixed_with_those_that_serve(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    daemon = wnodesd(*TWICE)
    ends = daemon.ends = [os.eventfd(0), os.eventfd(1)]

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path, spare=2), channel, daemon.holding)  # type: ignore[arg-type]
        await ordered(accounts, channel)
        channel.sent.clear()
        other = replace(BOTH, mounts=(BOTH.mounts[0], Mount("/srv/more", "/data")))
        daemon.replies[0] = {"ok": True, "account": other.to_dict()}
        assert "other mounts are its own by now" in await refused(accounts, channel)
        await accounts.stop()

    asyncio.run(run())
    for fd in ends:
        os.close(fd)
    assert len(daemon.fds) == 2, "nothing was handed out for it"


def test_ports_of_an_attempt_that_failed_are_free_for_the_next(tmp_path: Path, port: Any, wnodesd: Any) -> None:
    no = {"ok": False, "error": {"kind": "MountDenied", "message": "source '/srv/data': none", "hint": ""}}
    daemon = wnodesd(TWICE[0], no)

    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path, spare=2), channel, daemon.holding)  # type: ignore[arg-type]
        assert "none" in await refused(accounts, channel)
        daemon.replies[:] = [GRANTED, {"ok": True}]  # the site has mended its policy
        await ordered(accounts, channel)
        await accounts.stop()

    asyncio.run(run())
    assert [each.get("only") for each in daemon.asked] == [None, None]


def test_a_flood_of_commands_is_bounded(tmp_path: Path) -> None:
    async def run() -> None:
        channel = Channel()
        accounts = Accounts(plan(tmp_path), channel, None)  # type: ignore[arg-type]
        for number in range(1000):
            accounts.opened(frames.GUEST_BIT | number, wish("alice", "id"))
        assert len(channel.handlers) == 64 and len(channel.sent) == 936
        await accounts.stop()

    asyncio.run(run())


@pytest.mark.parametrize("reply", [b"", b"{}\n", b"[]\n", b"x\n", b'{"ok": true}\n', b'{"ok": true, "account": {}}\n'])
def test_a_wnodesd_that_says_nonsense_is_an_error_and_no_bug(tmp_path: Path, reply: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/d.sock")
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(WnodesError):
            ask_wnodesd(f"{tmp_path}/d.sock", {}, lambda account: [])
        thread.join()


def test_the_way_in_hides_before_it_shows_and_ends_at_the_first_failure() -> None:
    lines = ENTER.strip().splitlines()
    assert lines[0] == "set -eu" and ENTER.index("umount") < ENTER.index("mkdir") < ENTER.index("setpriv")
