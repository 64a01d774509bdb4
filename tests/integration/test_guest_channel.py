"""The guest channel in a real guest: what no local process can show.

``guest_channel``: the connected GuestChannel of a booted guest; ``call`` runs a coroutine in its loop.
"""

from __future__ import annotations

import time

import pytest

from wnodes_core.guest import start

pytestmark = pytest.mark.guest

USER = {"name": "jo", "uid": 4321, "gid": 4321, "home": "/home/jo", "shell": "/bin/sh"}
GROUPS = [{"name": "jo", "gid": 4321}, {"name": "lab", "gid": 4400}]
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
    done = call(
        guest_channel.run(["sh", "-c", "id -un; id -G; uname -n; date +%s; test -x /run/wnodes/bin/squeue"], **AS_JO)
    )
    name, groups, node, clock = done.stdout.decode().split("\n")[:4]
    assert (done.code, name, groups, node) == (0, "jo", "4321 4400", "wn-7")
    assert abs(int(clock) - time.time()) < 5


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
