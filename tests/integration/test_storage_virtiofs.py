"""virtiofs in a real guest: the storage contract, its seals, and a gateway that dies."""

from __future__ import annotations

import os
import pwd
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from storage_guests import Served, booted, template_of  # noqa: E402

from wnodes_core import processes  # noqa: E402
from wnodes_core.errors import NoProvider  # noqa: E402
from wnodes_core.model import Image, Mount, Process
from wnodes_core.storage import devices, sshfs, virtiofs
from wnodes_core.testing.storage_devices import BootWith, StorageDevices
from wnodes_core.testing.storage_guest import Job
from wnodes_core.tools import alive, run, spawn

pytestmark = pytest.mark.guest
_SOON_S = 10.0


@pytest.fixture(scope="module")
def boot_with(minimal_image: Image, ordinary_user: pwd.struct_passwd) -> BootWith:
    return partial(booted, minimal_image, ordinary_user)


class Virtiofs(StorageDevices):
    provider, name = "wnodes_core.storage.virtiofs", "virtiofs"

    @property
    def root_is_the_user(self) -> bool:
        """The server in C wants to become guest root, which the host's kernel refuses; the one in Rust does not try."""
        return virtiofs.knows_rust_options(virtiofs.find_server())

    def test_the_gateways_mounts_are_sealed(self, guest: Served, mounts: tuple[Mount, ...]) -> None:
        """What a hostile guest may ask of its gateway without its own kernel between: the host's kernel has the last word."""
        seals = []
        for each in servers(guest):
            seen = [line.split() for line in Path(f"/proc/{each.pid}/mountinfo").read_text().splitlines()]
            seals += [set(words[5].split(",")) for words in seen if words[4] == ("/tmp" if self.root_is_the_user else "/")]
            assert not [words[4] for words in seen if words[4] in ("/home", "/var", "/sys", "/proc")]
            assert not os.path.exists(f"/proc/{each.pid}/root/etc/passwd"), "it sees more of the host than its folder"
        assert len(seals) == len(mounts) and all({"nosuid", "nodev"} <= each for each in seals), seals
        assert len([each for each in seals if "ro" in each]) == 1

    def test_guest_root_cannot_write_to_what_is_read_only(self, guest: Served, home: Path, ordinary_user: Any) -> None:
        """Not by a mount of its own either: the host's kernel refuses."""
        (home / "kept").write_text("kept\n")
        os.chown(home / "kept", ordinary_user.pw_uid, ordinary_user.pw_gid)
        (home / "kept").chmod(0o644)
        as_user = f"setpriv --reuid={ordinary_user.pw_uid} --regid={ordinary_user.pw_gid} --clear-groups"
        done = guest.run(
            f"mkdir -p /again; mount -t virtiofs wnodes1 /again; cd /again; ls; echo x >new; {as_user} sh -c"
            " 'echo x >>kept; chmod 777 kept; touch -d 2001-01-01 kept; rm kept'"
        )
        assert b"kept" in done.stdout
        assert done.stderr.count(b"Read-only file system") >= 4, done
        assert ((home / "kept").read_text(), (home / "kept").stat().st_mode & 0o777) == ("kept\n", 0o644)

    def writes_a_log(self, job: Job, home: Path) -> Path:
        """The job writes line after line, until it cannot any more, and says then what it was told."""
        log = home / "log"
        job("(while echo line; do sleep 0.02; done >log 2>/tmp/said; echo over >>/tmp/said) >/dev/null 2>&1 &")
        deadline = time.monotonic() + _SOON_S
        while not (log.exists() and log.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return log

    def holds_nothing_up(self, guest: Served, victims: list[Process], mounts: tuple[Mount, ...], log: Path) -> None:
        """QEMU calls no second time: its files are gone for the job, which may hang on them; the rest goes on."""
        assert len(victims) == len(mounts), victims
        for each in victims:
            os.kill(each.pid, signal.SIGKILL)
        deadline = time.monotonic() + _SOON_S
        while servers(guest):
            assert time.monotonic() < deadline, "a server outlives who speaks for it"
            time.sleep(0.05)
        assert guest.run(f"(timeout 5 ls '{mounts[1].target}' >/dev/null 2>&1 &) ; echo on").stdout == b"on\n"
        assert set(log.read_text().splitlines()) == {"line"}, "what was written is not corrupt"


class TestVirtiofs(Virtiofs):
    def test_a_gateway_that_dies_holds_nothing_up(
        self, guest: Served, job: Job, home: Path, mounts: tuple[Mount, ...]
    ) -> None:
        """Last here."""
        self.holds_nothing_up(guest, servers(guest), mounts, self.writes_a_log(job, home))


# Whether a process of the user's may have another's memory, or its first 16 open files by pidfd_getfd(2).
REACH = """
import ctypes, os, sys
pid = int(sys.argv[1])
try:
    os.open(f"/proc/{pid}/mem", os.O_RDWR)
    print("memory")
except PermissionError:
    print("no memory")
libc, pidfd = ctypes.CDLL(None), os.pidfd_open(pid)
print([fd for fd in range(16) if libc.syscall(438, pidfd, fd, 0) >= 0])
"""


class TestVirtiofsInAClone(Virtiofs):
    """The same of a VM whose memory nobody shares: its gateways copy."""

    @pytest.fixture(scope="class")
    @classmethod
    def boot_with(cls, minimal_image: Image, ordinary_user: pwd.struct_passwd) -> Iterator[BootWith]:
        with template_of(minimal_image, ordinary_user) as template:
            yield partial(booted, minimal_image, ordinary_user, template=template)

    def test_a_server_cannot_reach_the_vm_s_memory_through_who_copies(
        self, guest: Served, ordinary_user: pwd.struct_passwd
    ) -> None:
        """It is the same user in the same namespace, speaks with the guest, and may fall to it."""
        server, copier = servers(guest)[0], copiers(guest)[0]
        become = ["setpriv", f"--reuid={ordinary_user.pw_uid}", f"--regid={ordinary_user.pw_gid}", "--init-groups"]
        enter = [*become, "nsenter", "--user", "--preserve-credentials", f"--target={server.pid}"]

        def reach(pid: int) -> str:
            return run([*enter, sys.executable, "-I", "-c", REACH, str(pid)]).text

        assert reach(copier.pid) == "no memory\n[]\n"
        beside = spawn([*enter, "sleep", "60"])
        try:
            while (processes.read(beside.pid).command or ("",))[0] != "sleep":  # type: ignore[union-attr]
                time.sleep(0.01)
            assert reach(beside.pid).startswith("memory\n[0, 1, 2"), "nobody could, so the test says nothing"
        finally:
            beside.kill()
            beside.wait()
        assert not [fd for fd in os.listdir(f"/proc/{server.pid}/fd") if "/mem" in os.readlink(f"/proc/{server.pid}/fd/{fd}")]
        kept = Path(f"/proc/{server.pid}/status").read_text()
        assert all(not int(line.split()[1], 16) >> 19 & 1 for line in kept.splitlines() if line[:3] == "Cap"), kept

    def test_a_server_that_dies_is_an_error_at_once(self, guest: Served, job: Job, home: Path, top: Path) -> None:
        """As a mount by sshfs: never a process that hangs. Those of other mounts go on."""
        log = self.writes_a_log(job, home)
        before = len(copiers(guest))
        root = "/tmp" if self.root_is_the_user else "/"
        (victim,) = [each for each in servers(guest) if _serves(each, root, "log", writable=True)]
        os.kill(victim.pid, signal.SIGKILL)
        there = shlex.quote(str(home))
        said = job(f"ls {there}; echo more >{there}/more; cat {there}/log", code=1, cwd="/")
        assert said.count("Transport endpoint is not connected") == 3, said
        assert guest.run("until grep over /tmp/said; do sleep 0.1; done; cat /tmp/said").stdout.count(b"not connected") >= 1
        assert guest.run("cat /data/ro/log >/dev/null && echo on").stdout == b"on\n", "another mount of the same folder"
        assert set(log.read_text().splitlines()) == {"line"}, "what was written is not corrupt"
        assert len(copiers(guest)) == before - 1, "of servers that live"

    def test_a_copier_that_dies_ends_its_server_and_holds_nothing_up(
        self, guest: Served, mounts: tuple[Mount, ...], home: Path
    ) -> None:
        """Last here."""
        self.holds_nothing_up(guest, copiers(guest), mounts[1:], home / "log")


def _serves(server: Process, root: str, name: str, *, writable: bool) -> bool:
    """Whether its share, which it has at ``root``, holds such a file, and may be written to."""
    seen = [line.split() for line in Path(f"/proc/{server.pid}/mountinfo").read_text().splitlines()]
    sealed = any("ro" in words[5].split(",") for words in seen if words[4] == root)
    return os.path.exists(f"/proc/{server.pid}/root{root}/{name}") and sealed != writable


def servers(guest: Served) -> list[Process]:
    """Those of one VM, children of its keeper or of who copies for them."""
    server, keeper = virtiofs.find_server(), guest.real.process.pid
    everybody = {each.pid: each for each in processes.table()}
    found = [each for each in everybody.values() if each.command[:1] == (server,) and each.parent in everybody]
    return [each for each in found if keeper in (each.parent, everybody[each.parent].parent)]


def copiers(guest: Served) -> list[Process]:
    """Who copies for servers that live."""
    parents = {each.parent for each in servers(guest)} - {guest.real.process.pid}
    return [each for each in processes.table() if each.pid in parents]


STARTER = """
import sys, time
from wnodes_core.api import Mount
from wnodes_core.storage import sshfs, virtiofs
print(virtiofs.wnodes_mount_equip(Mount(sys.argv[1], "/t"), 0, sys.argv[1], {}, "virtiofs", None)["process"]["pid"], flush=True)
time.sleep(60)
"""


def test_one_that_nobody_has_called_yet_dies_with_its_keeper(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    starter = spawn([sys.executable, "-I", "-c", STARTER, str(tmp_path)], stdout=writer, stderr=2)
    os.close(writer)
    with os.fdopen(reader) as said:
        gateway = processes.read(int(said.readline()))
    assert gateway is not None
    deadline = time.monotonic() + _SOON_S
    while "virtiofsd" not in processes.read(gateway.pid).command[0]:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    starter.kill()
    starter.wait(10)
    while alive(Process(gateway.pid, 0, 0, gateway.started, "", ())):
        assert time.monotonic() < deadline, "it waits for ever"
        time.sleep(0.01)


def test_a_gateway_sees_its_folder_and_programs_and_nothing_else(tmp_path: Path) -> None:
    """Whatever the server's own sandbox is: that of the one in Rust wants root, so it has none."""
    (tmp_path / "mine").write_text("x")
    look = "cd /; echo *; echo tmp/* etc/* proc/* proc/self/*; cat /etc/passwd || echo none; echo y >tmp/mine || echo sealed"
    reader, writer = os.pipe()
    log = os.open("/dev/null", os.O_WRONLY)
    argv = [*virtiofs._confined(Mount(str(tmp_path), "/t", True), "virtiofs_exec", [os.getpid(), log]), "/usr/bin/dash", "-c", look]
    child = spawn(argv, stdout=writer, stderr=2, pass_fds=(log,))
    os.close(writer)
    os.close(log)
    with os.fdopen(reader) as said:
        root, below, *rest = said.read().splitlines()
    assert child.wait(10) == 0 and rest == ["none", "sealed"], (root, below, rest)
    assert set(root.split()) <= {"etc", "lib", "lib64", "proc", "tmp", "usr"}
    told = {"tmp/mine", "etc/ld.so.cache", "proc/self", "proc/sys", "proc/self/fd", "proc/self/mountinfo"}
    assert set(below.split()) == told


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (["sh", "-c", "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"], "Operation not permitted"),
        (["false"], "it ended"),
        (["sh", "-c", "exec sleep 60"], "nothing came of it"),
    ],
)
def test_a_host_that_starts_none_leaves_the_mount_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: list[str], said: str
) -> None:
    """As where AppArmor forbids namespaces to users. A verdict on the mount, never on the host."""
    monkeypatch.setattr(virtiofs, "_START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(virtiofs, "_confined", lambda mount, module, numbers: [*fault, "#"])
    before = sshfs.gateways()
    with pytest.raises(NoProvider, match=said):
        virtiofs.wnodes_mount_equip(Mount(str(tmp_path), "/t"), 0, str(tmp_path), {}, "virtiofs", None)
    assert sshfs.gateways() == before


def test_a_source_that_cannot_be_sealed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    monkeypatch.setattr(devices, "check_source", lambda mount: None)  # it vanishes just afterwards
    (tmp_path / "s").rmdir()
    with pytest.raises(NoProvider, match="No such file or directory"):
        virtiofs.wnodes_mount_equip(Mount(str(tmp_path / "s"), "/t"), 0, str(tmp_path), {}, "virtiofs", None)


def test_a_host_without_user_namespaces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("0\n")
    monkeypatch.setattr(virtiofs, "_NAMESPACES", str(tmp_path / "max"))
    assert "wants user namespaces" in virtiofs.wnodes_mount_usable()["problem"]
