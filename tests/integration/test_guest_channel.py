"""The guest channel in a real guest: what no local process can show.

``guest_channel``: the connected GuestChannel of a booted guest; ``call`` runs a coroutine in its loop.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from wnodes_core.guest import start
from wnodes_core.guest.relay import Relay

pytestmark = pytest.mark.guest

USER = {"name": "jo", "uid": 4321, "gid": 4321, "home": "/home/jo", "shell": "/bin/sh"}
GROUPS = [{"name": "jo", "gid": 4321}, {"name": "lab", "gid": 4400}]
LAUNCHER = """
import sys
from wnodes_core.guest import client
client.die_like(client.run(sys.argv[1], client.Command(sys.argv[2:], "/", {"PATH": "/usr/bin:/bin"})))
"""
AS_JO = {"uid": 4321, "gid": 4321, "groups": [4321, 4400]}


@pytest.fixture
def call(guest):
    return lambda coroutine: guest.wait(coroutine, 30)


def test_facts(guest_channel):
    facts = guest_channel.facts
    assert facts["version"] == 1 and facts["memory_kib"] > 64 << 10
    assert len(facts["boot_id"]) == 36


def test_setup_names_the_guest_and_its_user(guest_channel, call):
    shim = start.shim_text()
    setup = {
        "host_name": "wn-7",
        "clock": time.time(),
        "user": USER,
        "groups": GROUPS,
        "shim": shim,
        "commands": ["squeue"],
    }
    call(guest_channel.request("setup", **setup))
    script = "id -un; id -G; uname -n; date +%s; test -x /usr/lib/wnodes/bin/squeue"
    done = call(guest_channel.run(["sh", "-c", script], **AS_JO))
    name, groups, node, clock = done.stdout.decode().split("\n")[:4]
    assert (done.code, name, groups, node) == (0, "jo", "4321 4400", "wn-7")
    assert abs(int(clock) - time.time()) < 5


def test_the_hosts_commands_come_first_for_a_job_and_not_for_root(guest_channel, call):
    call(guest_channel.request("setup", shim=start.shim_text(), commands=["squeue"]))
    where = ["sh", "-c", "command -v squeue"]
    assert call(guest_channel.run(where, linger=False, **AS_JO)).stdout == b"/usr/lib/wnodes/bin/squeue\n"
    assert call(guest_channel.run(where)).stdout == b""


def test_a_job_keeps_no_right_of_the_agents(guest_channel, call):
    # posix_spawn starts it from an agent that is the user for a moment, with root in reserve.
    script = "grep -E '^(Uid|Gid|CapInh|CapPrm|CapEff|CapAmb)' /proc/self/status; kill -0 1"
    done = call(guest_channel.run(["sh", "-c", script], **AS_JO))
    facts = dict(line.split(":\t") for line in done.stdout.decode().splitlines())
    assert facts.pop("Uid").split() == facts.pop("Gid").split() == ["4321"] * 4
    assert {int(value, 16) for value in facts.values()} == {0} and done.code != 0


def test_the_agent_is_root_again_after_each_start(guest_channel, call):
    for argv in (["true"], ["/no/such"], ["/etc"]):
        call(guest_channel.run(argv, **AS_JO))
        assert call(guest_channel.run(["id", "-u"])).stdout == b"0\n"
    assert call(guest_channel.run(["true"], **{**AS_JO, "cwd": "/root"})).code == 126  # as the user, not as root


def test_whole_pages_reach_the_host_unharmed(guest, tmp_path):
    # splice(2) into a virtio-serial port: the guest's own kernel is what is tested here. A write
    # from a bad address leaves an empty buffer in the pipe, which that kernel must never splice.
    code = (
        "import ctypes,os;b=bytes(range(256))*4096;n=0;bad=ctypes.CDLL(None).write\n"
        "for s in [len(b)]*8 + [77, len(b), 4096]*4:\n"
        " n+=os.write(1, b[n%256:n%256+s]); assert bad(1, ctypes.c_void_p(1), 4096) == -1\n"
        "os.write(2, b'%d' % n)"
    )
    relay = Relay(tmp_path / "keeper.sock")
    guest.wait(relay.start(), 5)
    guest.loop.call_soon_threadsafe(relay.ready, guest.channel)
    try:
        launcher = [sys.executable, "-c", LAUNCHER, str(tmp_path / "keeper.sock"), "python3", "-c", code]
        done = subprocess.run(launcher, capture_output=True, timeout=30, stdin=subprocess.DEVNULL)
    finally:
        guest.wait(relay.stop(), 5)
    size = int(done.stderr)
    assert done.stdout == (bytes(range(256)) * (size // 256 + 1))[:size] and done.returncode == 0


def test_loopback_is_up(guest_channel, call):
    call(guest_channel.request("setup"))
    code = "import socket;s=socket.create_server(('127.0.0.1',0));socket.create_connection(s.getsockname());print('up')"
    assert call(guest_channel.run(["python3", "-c", code])).stdout == b"up\n"


def test_the_job_is_no_root_and_has_its_own_session(guest_channel, call):
    done = call(
        guest_channel.run(["sh", "-c", "id -u; echo $$; cut -d' ' -f6 /proc/self/stat; echo x > /etc/x"], **AS_JO)
    )
    uid, pid, session = done.stdout.decode().split()
    assert uid == "4321" and pid == session and done.code != 0 and not call(guest_channel.run(["ls", "/etc/x"])).stdout


def test_orphans_are_reaped(guest_channel, call):
    call(guest_channel.run(["sh", "-c", "setsid sh -c 'true & exec true' & wait"]))
    states = call(guest_channel.run(["sh", "-c", "cut -d' ' -f3 /proc/[0-9]*/stat"])).stdout
    assert b"Z" not in states


def test_the_port_is_closed_to_the_job(guest_channel, call):
    script = "p=$(grep -l org.wnodes.agent.0 /sys/class/virtio-ports/*/name); exec 3<>/dev/$(basename $(dirname $p))"
    assert call(guest_channel.run(["sh", "-c", script], **AS_JO)).code != 0
    assert call(guest_channel.run(["sh", "-c", script])).code != 0  # not even to root: one opener
