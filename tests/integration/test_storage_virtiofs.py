"""virtiofs in a real guest: a job's files, guest root against the host's, read-only, and a gateway that dies."""

from __future__ import annotations

import os
import pwd
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from netns_kit import Namespace  # noqa: E402
from network_guests import RealGuest  # noqa: E402

from wnodes_core import processes  # noqa: E402
from wnodes_core.errors import NoProvider  # noqa: E402
from wnodes_core.model import Image, Mount, Process
from wnodes_core.ports import Port, mac_of
from wnodes_core.storage import sshfs, virtiofs
from wnodes_core.tools import alive, run, spawn

pytestmark = pytest.mark.guest
_SOON_S = 10.0


class Served:
    """A VM of the user's with its mounts, one of them read-only."""

    count = 4

    def __init__(self, guest: RealGuest, top: Path, user: pwd.struct_passwd) -> None:
        self.guest, self.top, self.user = guest, top, user

    def job(self, script: str, *, root: bool = False) -> str:
        """A script as the job's user or as guest root, its errors in its output; it may fail."""
        become = [] if root else ["setpriv", f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups"]
        return self.guest.run(*become, "sh", "-c", f"exec 2>&1; cd /rw; {script}\ntrue")

    def gateways(self) -> list[Process]:
        server = virtiofs.find_server()
        found = [p for p in processes.table() if p.command[:1] == (server,) and p.uid == self.user.pw_uid]
        return [p for p in found if os.getpid() in {each.pid for each in processes.ancestry(p.pid)}]  # not another run's


@pytest.fixture(scope="module")
def served(minimal_image: Image, ordinary_user: pwd.struct_passwd) -> Iterator[Served]:
    top = Path(run(["mktemp", "-d", "/var/tmp/wnodes-vfs-XXXXXX"]).text.strip())
    top.chmod(0o755)
    (top / "secret").write_text("not for the guest")
    for name in ("rw, with a comma", "ro"):
        (top / name).mkdir()
        (top / name / "there").write_text("there\n")
        for path in (top / name, top / name / "there"):
            os.chown(path, ordinary_user.pw_uid, ordinary_user.pw_gid)
    (top / "ro/roots").write_text("roots\n")
    (top / "ro/roots").chmod(0o600)
    (top / "small").mkdir()
    (top / "gone").mkdir()
    os.chown(top / "gone", ordinary_user.pw_uid, ordinary_user.pw_gid)
    run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=777", "tmpfs", str(top / "small")])
    port = Port(lease="virtio", network="user", kind="user", mac=mac_of("virtiofs"), uid=ordinary_user.pw_uid)
    mounts = (Mount(str(top / "rw, with a comma"), "/rw"), Mount(str(top / "ro"), "/ro", True))
    mounts += (Mount(str(top / "small"), "/small"), Mount(str(top / "gone"), "/gone"))
    more = {"mounts": mounts, "storage": ("virtiofs", "sshfs")}
    guest = RealGuest(Namespace(), ordinary_user, minimal_image, port, None, **more)
    try:
        guest.wait()
        yield Served(guest, top, ordinary_user)
    finally:
        left = guest.close()
        run(["umount", "-l", str(top / "small")])
        run(["rm", "-rf", "--", str(top)])
    assert left == []


def test_the_jobs_files_are_the_users_on_both_sides(served: Served) -> None:
    assert "virtiofs" in served.job("grep ' /rw ' /proc/mounts")
    assert served.job("cat there; echo more >new; mkdir d; mv new d/; ln d/new hard; ln -s d/new soft; cat soft") == "there\nmore\n"
    made = served.top / "rw, with a comma/d/new"
    assert (made.stat().st_uid, made.read_text()) == (served.user.pw_uid, "more\n")
    digest = served.job("head -c 8000000 /dev/urandom >big; sha256sum <big; rm big").split()[0]
    assert len(digest) == 64
    made.write_text("by the host\n")
    time.sleep(2)
    assert served.job("cat d/new") == "by the host\n"


def test_what_else_a_job_does_to_its_files(served: Served) -> None:
    home = served.top / "rw, with a comma"
    names = ["with space", "quo'te\"s", "new\nline", "ünïcødé", "-dash", "back\\slash", "\udcff\udcfe", "n" * 255]
    program = f"""
import fcntl, mmap, os
names = {names!a}
os.mkdir("odd")
for name in names:
    open("odd/" + name, "w").close()
assert sorted(os.listdir("odd")) == sorted(names)
held = open("removed", "w+")
held.write("kept"); held.flush(); os.unlink("removed"); held.seek(0)
print(held.read(), os.fstat(held.fileno()).st_size)
both = open("mapped", "w+b"); both.truncate(8192)
fcntl.flock(both, fcntl.LOCK_EX); fcntl.lockf(both, fcntl.LOCK_EX)
pages = mmap.mmap(both.fileno(), 8192); pages[:5] = b"hello"; pages.flush()
with open("appended", "w") as file: file.write("0123456789")
os.truncate("appended", 4); os.utime("mapped", (981173106, 981173106))
with open("appended", "a") as file: file.write("ab")
"""
    (home / "job.py").write_text(program)
    assert served.job("python3 job.py") == "kept 4\n"
    assert sorted(os.listdir(home / "odd")) == sorted(names)
    assert (home / "mapped").read_bytes()[:5] == b"hello" and (home / "mapped").stat().st_mtime == 981173106
    assert (home / "appended").read_text() == "0123ab"
    assert not [name for name in os.listdir(home) if name.startswith((".fuse", "removed"))]


def test_a_full_disk_and_a_source_that_vanishes_are_errors(served: Served) -> None:
    said = served.job("head -c 16M /dev/zero >/small/x; rm /small/x; echo y >/small/y")
    assert "No space left on device" in said
    assert (served.top / "small/y").read_text() == "y\n", "it works again once there is room"
    (served.top / "gone").rmdir()
    assert "No such file or directory" in served.job("sleep 2; touch /gone/new")


def test_a_folder_that_turns_into_a_link_leads_nowhere(served: Served) -> None:
    """The race: the guest has looked a path up, and on the host a folder of it becomes a link out."""
    home = served.top / "rw, with a comma"
    (home / "turn").mkdir()
    (home / "turn/secret").write_text("harmless")
    assert served.job("cat turn/secret") == "harmless"
    os.rename(home / "turn", home / "turned")
    os.symlink(served.top, home / "turn")
    served.top.chmod(0o777)  # the user could write there, had it a way
    for root in (False, True, False):
        assert "not for the guest" not in served.job("cat turn/secret; echo x >turn/new", root=root)
    assert not (served.top / "new").exists()


def test_the_gateways_mounts_are_sealed(served: Served) -> None:
    """What a hostile guest may ask of its gateway without its own kernel between: the host's kernel has the last word."""
    seals = []
    for each in served.gateways():
        seen = [line.split() for line in Path(f"/proc/{each.pid}/mountinfo").read_text().splitlines()]
        seals += [set(words[5].split(",")) for words in seen if words[4] == "/"]
    assert len(seals) == served.count and all({"nosuid", "nodev"} <= each for each in seals), seals
    assert len([each for each in seals if "ro" in each]) == 1


def test_guest_root_is_nobody_special(served: Served) -> None:
    said = served.job(
        "echo x >mine; mknod null c 1 3; mknod disk b 8 0; cp /bin/true suid; chown 0:0 there; chown 1:1 there;"
        " su -s /bin/sh -c 'echo x >theirs' nobody; cat /ro/roots",
        root=True,
    )
    assert "roots\n" not in said.splitlines(keepends=True)
    home = served.top / "rw, with a comma"
    for name in ("mine", "null", "disk", "theirs"):
        found = home / name
        assert not found.exists() or found.stat().st_uid == served.user.pw_uid, (name, said)
    assert not (home / "null").exists() and not (home / "disk").exists()
    assert (home / "there").stat().st_uid == served.user.pw_uid


def test_links_lead_nowhere_outside(served: Served) -> None:
    said = served.job(f"ln -s {served.top}/secret door; ln -s ../secret back; cat door back ../secret; ln {served.top}/secret hard2; ls ..")
    assert "not for the guest" not in said
    assert (served.top / "secret").stat().st_nlink == 1


def test_guest_root_cannot_write_to_what_is_read_only(served: Served) -> None:
    """Not by a mount of its own either: the host's kernel refuses."""
    as_user = f"setpriv --reuid={served.user.pw_uid} --regid={served.user.pw_gid} --clear-groups"
    said = served.job(
        f"mkdir -p /again; mount -t virtiofs wnodes1 /again; cd /again; ls; echo x >new; {as_user} sh -c"
        " 'echo x >>there; chmod 777 there; touch -d 2001-01-01 there; rm there'",
        root=True,
    )
    assert "there" in said
    assert said.count("Read-only file system") >= 4, said
    kept = served.top / "ro/there"
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == ("there\n", 0o644)


def test_a_device_of_the_hosts_gives_nothing(served: Served) -> None:
    device = served.top / "rw, with a comma/zero"
    run(["mknod", "-m", "666", str(device), "c", "1", "5"])
    try:
        assert "\0" not in served.job("head -c 4 zero", root=True)
    finally:
        device.unlink()


def test_a_gateway_that_dies_holds_nothing_up(served: Served) -> None:
    """QEMU calls no second time: its files are gone for the job, which may hang on them; the rest goes on. Last here."""
    log = served.top / "rw, with a comma/log"
    served.job("(while echo line; do sleep 0.02; done >log 2>/dev/null &)")
    deadline = time.monotonic() + _SOON_S
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = served.gateways()
    assert len(found) == served.count, found
    for each in found:
        os.kill(each.pid, signal.SIGKILL)
    assert served.guest.run("sh", "-c", "(timeout 5 ls /rw >/dev/null 2>&1 &) ; echo on") == "on\n"
    assert set(log.read_text().splitlines()) == {"line"}, "what was written is not corrupt"


STARTER = """
import sys, time
from wnodes_core.api import Mount
from wnodes_core.storage import sshfs, virtiofs
print(virtiofs.wnodes_mount_equip(Mount(sys.argv[1], "/t"), 0, sys.argv[1], {}, "virtiofs")["process"]["pid"], flush=True)
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
    monkeypatch.setattr(virtiofs, "_confined", lambda mount, log: [*fault, "#"])
    before = sshfs.gateways()
    with pytest.raises(NoProvider, match=said):
        virtiofs.wnodes_mount_equip(Mount(str(tmp_path), "/t"), 0, str(tmp_path), {}, "virtiofs")
    assert sshfs.gateways() == before


def test_a_source_that_cannot_be_sealed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    monkeypatch.setattr(virtiofs, "check_source", lambda mount: None)  # it vanishes just afterwards
    (tmp_path / "s").rmdir()
    with pytest.raises(NoProvider, match="No such file or directory"):
        virtiofs.wnodes_mount_equip(Mount(str(tmp_path / "s"), "/t"), 0, str(tmp_path), {}, "virtiofs")


def test_a_host_without_user_namespaces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("0\n")
    monkeypatch.setattr(virtiofs, "_NAMESPACES", str(tmp_path / "max"))
    assert "wants user namespaces" in virtiofs.wnodes_mount_usable()["problem"]
