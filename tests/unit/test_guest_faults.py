"""Guests that lie, vanish or never come: each ends in a verdict, none in a hang."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from wnodes_core.errors import BootTimeout, ChannelLost, ImageDenied
from wnodes_core.guest import client, frames
from wnodes_core.guest.channel import GuestChannel

_spec = importlib.util.spec_from_file_location("guest_kit", Path(__file__).with_name("guest_kit.py"))
assert _spec is not None and _spec.loader is not None
guest_kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guest_kit)


@pytest.fixture
def kit(tmp_path):
    kit = guest_kit.Kit(tmp_path)
    try:
        yield kit
    finally:
        kit.close()


def start_client(kit):
    """A client in a process of its own that prints the error it ends with."""
    code = (
        "import sys\nfrom wnodes_core.guest import client\n"
        "try: print(client.run(sys.argv[1], client.Command(['true'], '/', {}), progress=print))\n"
        "except Exception as e: print(type(e).__name__, e.message)\n"
    )
    import sys

    return subprocess.Popen([sys.executable, "-uc", code, kit.socket], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)


GARBAGE = [
    b"\xff" * 64,
    frames.HEADER.pack(frames.DATA, 1, 0, 2, 1 << 31),
    frames.pack(frames.DATA, 1, 2, b"x" * frames.MAX_DATA) * 5,  # more than was granted
    frames.pack(frames.EXIT, 0, 2, b"{" * 5000),
    frames.pack(frames.EXIT, 0, 2, b"[" * 90_000),
    frames.pack(frames.EXIT, 0, 2, b'{"code":"x"}'),
    frames.pack(frames.EXIT, 0, 2, b'{"code":70000}'),
    frames.pack(frames.OPEN, 0, 2, b"{}"),
    frames.pack(frames.NOTE, 0, 2, b"{}"),
    frames.pack(frames.DATA, 1, 99, b"x"),
    frames.pack(frames.EXIT, 0, 0, b"{}"),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_guest_garbage_is_channel_lost(kit, garbage):
    kit.serve()
    port = kit.fake_guest()
    process = start_client(kit)
    kind, _, stream, _ = guest_kit.read_frame(port)
    assert (kind, stream) == (frames.OPEN, 2)
    with contextlib.suppress(OSError):  # cut off in the middle of it
        port.sendall(garbage)
    assert b"ChannelLost" in process.communicate(timeout=10)[0]


def test_channel_cut_in_mid_stream(kit):
    kit.serve()
    port = kit.fake_guest()
    process = start_client(kit)
    guest_kit.read_frame(port)
    port.sendall(frames.pack(frames.DATA, 1, 2, b"half")[:-2])
    port.close()
    out = process.communicate(timeout=10)[0]
    assert b"ChannelLost guest channel" in out


def test_the_guest_dies_under_a_command(kit):
    kit.start()
    process = kit.popen(
        "sh", "-c", "echo $PPID; read x", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    kit.agent.kill()
    assert b"ChannelLost" in process.communicate(timeout=10)[1]
    assert process.returncode == 1


def test_the_keeper_goes_and_the_agent_ends_its_commands(kit):
    kit.start()
    process = kit.popen(
        "sh", "-c", "echo $$; read x", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    fd = os.pidfd_open(pid)
    kit.do(kit.channel.close)
    import select

    assert select.select([fd], [], [], 5)[0]
    os.close(fd)
    process.communicate(timeout=10)
    assert kit.agent.wait(5) == 0


def test_a_guest_that_never_answers_is_a_boot_timeout(kit):
    with pytest.raises(BootTimeout, match="within 0.2 s"):
        kit.call(GuestChannel.connect(kit.folder / "agent.sock", timeout_s=0.2))
    with pytest.raises(BootTimeout):
        kit.call(GuestChannel.connect(kit.folder / "nothing.sock", timeout_s=0.1))


def test_progress_then_an_error_before_the_guest_is_ready(kit):
    kit.serve()
    kit.do(kit.relay.announce, "fetching the image")
    process = start_client(kit)
    assert process.stdout is not None
    assert process.stdout.readline() == b"fetching the image\n"
    kit.do(kit.relay.announce, "booting")
    assert process.stdout.readline() == b"booting\n"
    kit.do(kit.relay.fail, ImageDenied("image 'x': not for you"))
    assert process.communicate(timeout=10)[0] == b"ImageDenied image 'x': not for you\n"
    late = start_client(kit)
    assert b"ImageDenied" in late.communicate(timeout=10)[0]


def test_a_signal_before_the_guest_is_ready_ends_the_launcher(kit):
    kit.serve()
    kit.do(kit.relay.announce, "booting")
    process = kit.popen("true", stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"wnodes: booting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_no_keeper_is_channel_lost(tmp_path):
    with pytest.raises(ChannelLost, match="no keeper answers"):
        client.run(tmp_path / "no.sock", client.Command(["true"], "/", {}), connect_timeout_s=0.05)


def test_an_agent_that_does_not_answer_is_channel_lost(kit):
    kit.serve()
    kit.fake_guest()
    start = time.monotonic()
    with pytest.raises(ChannelLost, match="no answer within 0.1 s"):
        kit.call(kit.channel.request("ping", timeout_s=0.1))
    assert time.monotonic() - start < 5


def test_the_first_and_the_last_launcher_are_told(kit):
    kit.start()
    seen: list[str] = []
    kit.relay.on_first = lambda: seen.append("first")
    kit.relay.on_last_closed = lambda: seen.append("last")
    assert kit.run("true").returncode == 0
    deadline = time.monotonic() + 5
    while len(seen) < 2 and time.monotonic() < deadline:
        kit.do(lambda: None)
    assert seen == ["first", "last"]
