"""The pool's parts: messages between its processes, leaving root, handing a slot and a channel over."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from wnodes_core import processes
from wnodes_core.agent import claiming, slots
from wnodes_core.command import spawn
from wnodes_core.errors import ChannelLost, HostError, RequestError, SettingsError, TransientError, WnodesError
from wnodes_core.guest import frames, handover
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.pool import become, keeper, wire
from wnodes_core.pool.ending import end_all_of
from wnodes_core.pool.warden import Account
from wnodes_core.settings import values

UID, USER = 64901, 64902


def _in_child(work: Callable[[], None]) -> str:
    """What ``work`` raises in a process of its own, '' for nothing."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            said = ""
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(send, said.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def test_a_message_is_whole_with_its_files_or_an_error() -> None:
    ours, theirs = wire.pair()
    with open(os.devnull, "rb") as null:
        wire.send(ours, {"a": 1}, [null.fileno()])
    message, fds = wire.receive(theirs)
    assert message == {"a": 1} and len(fds) == 1
    wire.close(fds)
    wire.close(fds)
    for garbage in (b"[1]", b"{", b'"x"', b"[" * 50000):
        ours.send(garbage)
        with pytest.raises(TransientError, match="no JSON"):
            wire.receive(theirs)
    with pytest.raises(TransientError, match="want at most"):
        wire.send(ours, {"a": "x" * wire.MAX_BYTES})
    ours.close()
    with pytest.raises(TransientError, match="gone"):
        wire.receive(theirs)
    with pytest.raises(TransientError, match="gone"):
        wire.send(theirs, {})
    theirs.close()


def test_becoming_a_user_is_for_good() -> None:
    def work() -> None:
        become.become(UID, UID, [USER])
        status = Path("/proc/self/status").read_text()
        facts = {line.split(":")[0]: line.split()[1:] for line in status.splitlines() if line.split()[1:]}
        assert facts["Uid"] == facts["Gid"] == [str(UID)] * 4, facts
        assert facts["Groups"] == [str(USER)]
        for call in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.setresgid(0, 0, 0)):
            with pytest.raises(PermissionError):
                call()
        assert os.stat("/proc/self").st_uid == UID, "others see whose it is"

    assert _in_child(work) == ""


def test_nobody_becomes_root_or_somebody_else() -> None:
    with pytest.raises(HostError, match="another than root"):
        become.become(0, 0, [])

    def work() -> None:
        become.become(UID, UID, [])
        become.become(USER, USER, [])

    assert f"HostError: want uid {USER}" in _in_child(work)


def test_all_of_an_account_is_ended() -> None:
    pids = []
    for _ in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            become.become(UID, UID, [])
            time.sleep(60)
            os._exit(0)
    deadline = time.monotonic() + 10
    while sum(each.uid == UID for each in processes.table()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert end_all_of(UID) and end_all_of(UID)
    assert [os.WTERMSIG(os.waitpid(pid, 0)[1]) for pid in pids] == [9, 9]


def test_a_slot_gives_its_user_what_it_owned_and_nothing_of_others(tmp_path: Path) -> None:
    folder, foreign = tmp_path / "slot", tmp_path / "foreign"
    foreign.write_text("root's")
    folder.mkdir(mode=0o700)
    (folder / "console.log").symlink_to(foreign)
    os.link(foreign, folder / "qemu.log")
    os.chown(folder, UID, UID)
    user = SimpleNamespace(uid=USER, gid=USER)
    slot = SimpleNamespace(plan=SimpleNamespace(folder=str(folder)), account=Account(UID, UID))
    keeper._hand_over(slot, SimpleNamespace(user=user, slot=str(folder)))  # type: ignore[arg-type]
    assert folder.stat().st_uid == USER and foreign.stat().st_uid == 0
    for name in keeper.OWN_FILES:
        (folder / name).unlink()
    (folder / "console.log").write_text("said")
    os.chown(folder / "console.log", UID, UID)
    with pytest.raises(HostError, match=f"want a folder of uid {UID}"):  # it has been given away once
        keeper._hand_over(slot, SimpleNamespace(user=user, slot=str(folder)))  # type: ignore[arg-type]
    os.chown(folder, UID, UID)
    keeper._hand_over(slot, SimpleNamespace(user=user, slot=str(folder)))  # type: ignore[arg-type]
    assert (folder / "console.log").stat().st_uid == USER


def _channel(left: bytes) -> tuple[str, bytes]:
    """What comes of passing on a channel on which ``left`` has come; what its next holder then hears of the guest."""

    async def talk() -> tuple[str, bytes]:
        guest, host = socket.socketpair()
        guest.setblocking(False)
        try:
            return await heard(guest, host)
        finally:
            guest.close()
            await asyncio.sleep(0.02)

    async def heard(guest: socket.socket, host: socket.socket) -> tuple[str, bytes]:
        first = await handover.go_on(host, {"machine": "x"})
        guest.send(left)
        await asyncio.sleep(0.02)
        try:
            port = handover.release(first)
        except ChannelLost as error:
            return str(error), b""
        second = await handover.go_on(port, first.facts)
        asking = asyncio.ensure_future(second.request("ping"))
        await asyncio.sleep(0.02)
        kind, _, _, stream, _ = frames.HEADER.unpack(guest.recv(4096)[: frames.HEAD])
        assert kind == frames.OPEN
        guest.send(frames.pack(frames.REPLY, 0, stream, b'{"ok":{"time":1}}'))
        answer = await asking
        second.close()
        return "", json.dumps({**second.facts, **answer}).encode()

    return asyncio.run(talk())


def test_a_channel_is_passed_on_between_frames_only() -> None:
    assert _channel(b"") == ("", b'{"machine": "x", "time": 1}')
    late = frames.pack(frames.REPLY, 0, 1, b"{}")
    assert _channel(late)[0] == "", "a late answer to its first holder is nobody's"
    assert "middle of a frame" in _channel(late[:-1])[0]
    assert "middle of a frame" in _channel(late[:5])[0]


def test_a_lost_channel_is_not_passed_on() -> None:
    async def talk() -> None:
        guest, host = socket.socketpair()
        channel: GuestChannel = await handover.go_on(host, {})
        guest.close()
        await asyncio.sleep(0.02)
        with pytest.raises(ChannelLost):
            handover.release(channel)
        await asyncio.sleep(0.02)

    asyncio.run(talk())


def test_a_slot_has_an_account_that_nobody_has() -> None:
    with pytest.raises(SettingsError, match="'root'"):
        slots.check_account(0)
    slots.check_account(UID)
    assert list(values.numbers("90000-90001")) == [90000, 90001] and not values.numbers("none")
    for wrong in ("0-5", "5-4", "5", "a-b", "-", ""):
        with pytest.raises(ValueError, match="range"):
            values.numbers(wrong)


def test_only_a_slot_of_ours_is_undone(tmp_path: Path) -> None:
    store = SimpleNamespace(release=lambda name: None)
    for wrong in ("../../etc", "0", "12-zzzz", "1-abcd/..", ""):
        with pytest.raises(WnodesError, match="no slot of ours"):
            slots.Slots(str(tmp_path), store).undo(wrong)
    slots.Slots(str(tmp_path), store).undo(f"{UID}-abcd")


def test_a_launcher_names_host_commands_and_nothing_else() -> None:
    assert claiming.host_commands({}, {"host_commands": ["squeue"]}) == ["squeue"]
    assert claiming.host_commands({"host_commands": ["site"]}, {"host_commands": ["squeue"]}) == ["site"]
    assert claiming.host_commands({}, {}) == []
    for wrong in ("squeue", [1], [""], ["x" * 65], ["x"] * 65, None):
        with pytest.raises(RequestError, match="want at most"):
            claiming.host_commands({}, {"host_commands": wrong})


def test_a_launcher_with_files_of_its_own_gets_no_slot() -> None:
    assert claiming.sees_the_same(os.getpid())
    child = spawn(["unshare", "--mount", "sleep", "60"])
    try:
        deadline = time.monotonic() + 10
        while claiming.sees_the_same(child.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert not claiming.sees_the_same(child.pid)
