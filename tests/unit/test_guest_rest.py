"""Rest and wake of the real agent, and the channel that finds it again: the agent is a local process here."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from wnodes_core.errors import BootTimeout, ChannelLost
from wnodes_core.guest import frames, identity, ports
from wnodes_core.guest.channel import GuestChannel

_spec = importlib.util.spec_from_file_location("guest_kit", Path(__file__).with_name("guest_kit.py"))
assert _spec is not None and _spec.loader is not None
guest_kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guest_kit)

SEED, LEASE = "var/lib/systemd/random-seed", "var/lib/dhcp/dhclient.eth0.leases"
FILES = {
    "proc/sys/kernel/random/boot_id": "11111111-2222-4333-8444-555555555555\n",
    "etc/machine-id": "a" * 32 + "\n",
    "var/lib/dbus/machine-id": "a" * 32 + "\n",
    "etc/hostname": "the-template-with-a-long-name\n",
    "etc/ssh/ssh_host_rsa_key": "secret",
    "etc/ssh/ssh_host_rsa_key.pub": "public",
    "etc/ssh/sshd_config": "",
    SEED: "seed",
    LEASE: "lease",
    "var/lib/cloud/data/instance-id": "iid-old\n",
    "var/lib/cloud/instances/iid-old/user-data.txt": "",
    "run/cloud-init/instance-data.json": '{"v1": {"instance_id": "iid-old"}}',
}


@pytest.fixture
def kit(tmp_path):
    kit = guest_kit.Kit(tmp_path)
    try:
        yield kit
    finally:
        kit.close()


def furnish(kit):
    """A root folder like that of an ordinary image."""
    for name, text in FILES.items():
        path = kit.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (kit.root / "var/lib/cloud/instance").symlink_to("/var/lib/cloud/instances/iid-old")


def saved(kit):
    """Bring the agent to rest and let go of it as a builder does: (who it was, its port)."""
    told = kit.call(kit.channel.rest())
    port = kit.channel._transport.get_extra_info("socket").dup()
    kit.do(kit.channel.close)
    return identity.of(told), port


def woken(kit, port, asked):
    kit.channel, told = kit.call(GuestChannel.adopt(port, timeout_s=10, wake=asked))
    return told


def text(kit, name):
    return (kit.root / name).read_text()


def test_a_bare_guest_wakes_as_another(kit):
    (kit.root / "proc/sys/kernel/random").mkdir(parents=True)
    (kit.root / "etc/hostname").write_text("old\n")
    kit.boot()
    template, port = saved(kit)
    asked = identity.ask("wn-7")
    asked["clock"] = 0
    told = woken(kit, port, asked)
    assert abs(asked["clock"] - time.time()) < 10, "the clock is that of the sending"
    identity.check(template, asked, told)
    assert kit.channel.facts["boot_id"] == asked["boot_id"] and kit.channel.facts["version"] == 1
    assert not {"identity", "clock", "took_ms"} & set(kit.channel.facts)
    assert kit.call(kit.channel.run(["echo", "hi"])).stdout == b"hi\n"


def test_everything_of_an_ordinary_image_is_renewed(kit):
    furnish(kit)
    kit.boot()
    template, port = saved(kit)
    assert template["machine_id"] == "a" * 32 and template["host_name"].startswith("the-template")
    assert all(len(template[name]) == 64 for name in ("ssh_host_keys", "random_seed", "leases"))
    assert template["instance_id"] == "iid-old"
    # No key and no lease is handed on, not even to one who reads the template's disk.
    assert os.listdir(kit.root / "etc/ssh") == ["sshd_config"] and not (kit.root / LEASE).exists()
    asked = identity.ask("wn-7")
    told = woken(kit, port, asked)
    identity.check(template, asked, told)
    assert text(kit, "etc/machine-id") == text(kit, "var/lib/dbus/machine-id") == asked["machine_id"] + "\n"
    assert text(kit, "etc/hostname") == "wn-7\n", "nothing of the longer name is left"
    assert text(kit, "proc/sys/kernel/random/boot_id") == asked["boot_id"] + "\n"
    assert len((kit.root / SEED).read_bytes()) == 512
    new = f"i-{asked['machine_id']}"
    assert new in text(kit, "run/cloud-init/instance-data.json") and new in text(kit, "var/lib/cloud/data/instance-id")
    assert os.readlink(kit.root / "var/lib/cloud/instance") == f"/var/lib/cloud/instances/{new}"
    assert os.listdir(kit.root / "var/lib/cloud/instances") == [new]


def test_a_dbus_link_stays_one(kit):
    furnish(kit)
    link = kit.root / "var/lib/dbus/machine-id"
    link.unlink()
    link.symlink_to("/etc/machine-id")
    kit.boot()
    _, port = saved(kit)
    woken(kit, port, identity.ask("wn-7"))
    assert link.is_symlink()


def test_a_guest_at_rest_does_nothing_but_wake_once(kit):
    furnish(kit)
    kit.boot()
    kit.call(kit.channel.rest())
    for verb, args in (("setup", {}), ("hello", {}), ("rest", {"modules": []}), ("exec", {"argv": ["true"]}), ("write_file", {})):
        with pytest.raises(ChannelLost, match="at rest"):
            kit.call(kit.channel.request(verb, **args))
    kit.call(kit.channel.request("wake", **identity.ask("wn-7")))
    with pytest.raises(ChannelLost, match="this guest is not at rest"):
        kit.call(kit.channel.request("wake", **identity.ask("wn-8")))
    assert text(kit, "etc/hostname") == "wn-7\n"


def test_a_guest_with_work_does_not_rest(kit):
    kit.boot()
    work = asyncio.run_coroutine_threadsafe(kit.channel.run(["sleep", "20"]), kit.loop)
    with pytest.raises(ChannelLost, match="commands still run"):
        kit.call(kit.channel.rest())
    work.cancel()


def test_what_cannot_be_changed_fails_at_rest_and_not_in_each_clone(kit):
    furnish(kit)
    (kit.root / "etc/machine-id").unlink()
    (kit.root / "etc/machine-id").mkdir()  # for root no mode forbids to write
    kit.boot()
    with pytest.raises(ChannelLost, match="IsADirectoryError"):
        kit.call(kit.channel.rest())


@pytest.mark.parametrize("name", ["entropy", "clock", "host_name", "machine_id", "boot_id"])
def test_a_wake_that_lacks_a_word_is_refused(kit, name):
    furnish(kit)
    kit.boot()
    kit.call(kit.channel.rest())
    asked = identity.ask("wn-7")
    del asked[name]
    with pytest.raises(ChannelLost, match=f"wake: KeyError: '{name}'"):
        kit.call(kit.channel.request("wake", **asked))
    with pytest.raises(ChannelLost, match="at rest"):
        kit.call(kit.channel.request("setup"))


# The channel's side: QEMU comes to us.


class Clone(threading.Thread):
    """Plays the QEMU of a clone: connects, reads the request, says ``answer``; then waits to be hung up on."""

    def __init__(self, path, answer, *, hang_up=False):
        super().__init__(daemon=True)
        self.path, self.answer, self.hang_up = str(path), answer, hang_up
        self.start()

    def run(self):
        deadline = time.monotonic() + 5
        with socket.socket(socket.AF_UNIX) as port:
            while port.connect_ex(self.path) and time.monotonic() < deadline:
                time.sleep(0.01)
            port.settimeout(10)
            kind, _, stream, self.asked = guest_kit.read_frame(port)
            assert (kind, stream) == (frames.OPEN, 1)
            with contextlib.suppress(OSError):
                port.sendall(self.answer)
                while not self.hang_up and port.recv(4096):
                    pass


def resume(kit, timeout_s=5.0):
    return kit.call(GuestChannel.resume(kit.folder / "clone.sock", timeout_s=timeout_s, wake=identity.ask("wn-7")))


def reply(text):
    return frames.pack(frames.REPLY, 0, 1, text)


def test_a_clone_is_woken_as_soon_as_it_comes(kit):
    clone = Clone(kit.folder / "clone.sock", reply(b'{"ok":{"kernel":"6","clock":1,"identity":{}}}'))
    kit.channel, told = resume(kit)
    assert told == {"kernel": "6", "clock": 1, "identity": {}} and kit.channel.facts == {"kernel": "6"}
    assert b'"verb":"wake"' in clone.asked
    assert not (kit.folder / "clone.sock").exists(), "the path is free for a boot"


def test_a_silent_clone_is_a_boot_timeout(kit):
    clone = Clone(kit.folder / "clone.sock", b"")
    began = time.monotonic()
    with pytest.raises(BootTimeout, match="silent after wake"):
        resume(kit, 0.5)
    assert time.monotonic() - began < 5
    clone.join(5)
    assert not clone.is_alive(), "it was hung up on"


def test_no_hypervisor_is_a_boot_timeout_and_leaves_no_socket(kit):
    with pytest.raises(BootTimeout, match="no hypervisor came"):
        resume(kit, 0.2)
    assert not (kit.folder / "clone.sock").exists()


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 64,
        b"WNODES-BOOT 1 7\n",  # its agent has died: the bootstrap asks for another
        reply(b'{"error":"OSError: no"}'),
        reply(b'{"ok":[]}'),
        reply(b"[1]"),
        reply(b"{" * 5000),
        frames.HEADER.pack(frames.REPLY, 0, 0, 1, 1 << 30),
        frames.pack(frames.REPLY, 0, 9, b'{"ok":{}}'),
    ],
    ids=range(8),
)
def test_a_clone_that_talks_nonsense_is_lost(kit, answer):
    Clone(kit.folder / "clone.sock", answer)
    with pytest.raises(ChannelLost):
        resume(kit)


def test_a_clone_that_hangs_up_is_lost(kit):
    Clone(kit.folder / "clone.sock", b"", hang_up=True)
    with pytest.raises(ChannelLost, match="the VM has gone"):
        resume(kit)


def test_a_stale_socket_is_no_obstacle(kit):
    path = kit.folder / "clone.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    Clone(path, reply(b'{"ok":{}}'))
    kit.channel, _ = resume(kit)


def test_giving_up_on_a_clone_frees_the_path(kit):
    async def give_up():
        task = asyncio.ensure_future(ports.accept(kit.folder / "clone.sock", 10))
        await asyncio.sleep(0)
        mode = (kit.folder / "clone.sock").stat().st_mode  # it is there from the first step on
        assert mode & 0o777 == 0o600, "nobody else may play our hypervisor"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    kit.call(give_up())
    assert not (kit.folder / "clone.sock").exists()
