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
from wnodes_core.model import Image, Mount, Process
from wnodes_core.ports import Port, mac_of
from wnodes_core.storage import virtiofs
from wnodes_core.tools import alive, run, spawn

pytestmark = pytest.mark.guest
_SOON_S = 10.0


class Served:
    """A VM of the user's with two mounts, one of them read-only."""

    def __init__(self, guest: RealGuest, top: Path, user: pwd.struct_passwd) -> None:
        self.guest, self.top, self.user = guest, top, user

    def job(self, script: str, *, root: bool = False) -> str:
        """A script as the job's user or as guest root, its errors in its output; it may fail."""
        become = [] if root else ["setpriv", f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups"]
        return self.guest.run(*become, "sh", "-c", f"exec 2>&1; cd /rw; {script}\ntrue")


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
    port = Port(lease="virtio", network="user", kind="user", mac=mac_of("virtiofs"), uid=ordinary_user.pw_uid)
    mounts = (Mount(str(top / "rw, with a comma"), "/rw"), Mount(str(top / "ro"), "/ro", True))
    more = {"mounts": mounts, "storage": ("virtiofs", "sshfs")}
    guest = RealGuest(Namespace(), ordinary_user, minimal_image, port, None, **more)
    try:
        guest.wait()
        yield Served(guest, top, ordinary_user)
    finally:
        left = guest.close()
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
    mark = [p for p in processes.table() if p.command[:1] == (virtiofs.find_server(),) and p.uid == served.user.pw_uid]
    assert len(mark) == 2, mark
    for each in mark:
        os.kill(each.pid, signal.SIGKILL)
    assert served.guest.run("sh", "-c", "(timeout 5 ls /rw >/dev/null 2>&1 &) ; echo on") == "on\n"


STARTER = """
import sys, time
from wnodes_core.api import Mount
from wnodes_core.storage import virtiofs
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


def test_a_host_without_user_namespaces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("0\n")
    monkeypatch.setattr(virtiofs, "_NAMESPACES", str(tmp_path / "max"))
    assert "wants user namespaces" in virtiofs.wnodes_mount_usable()["problem"]
