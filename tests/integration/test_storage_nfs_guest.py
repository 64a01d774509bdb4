"""The NFS gateway in a real guest: a lease's mounts on a bridge, guest root hostile, its gateway failing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from netns_kit import Namespace  # noqa: E402
from network_guests import RealGuest  # noqa: E402

from wnodes_core.api import Export, Image, Mount, Port, mac_of  # noqa: E402
from wnodes_core.network import bridge, names  # noqa: E402
from wnodes_core.storage import nfs, nfs_ganesha  # noqa: E402
from wnodes_core.testing.nfs_client import NfsClient, forged, host_handle  # noqa: E402
from wnodes_core.tools import run  # noqa: E402

pytestmark = [pytest.mark.guest, pytest.mark.net]
NODE, LOCAL, FIRST = "169.254.77.1", "169.254.80.5", 256


class Site:
    """A node with a lease whose mounts are exported, and the lease's guest; ``top`` is the node's file system."""

    def __init__(self, stack: contextlib.ExitStack, user: pwd.struct_passwd, image: Image) -> None:
        self.user = user
        self.top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wnodes-src-", dir="/var/tmp")))
        self.top.chmod(0o755)
        (self.top / "closed").mkdir(mode=0o700)
        (self.top / "closed/secret").write_text("of another user")  # readable, but for its folder
        kinds = ("it's a \"folder\"; né", "ro", "full", "dying")
        self.mounts = tuple(Mount(str(self.folder(name)), f"/data/{name}", name == "ro") for name in kinds)
        self.home, self.read_only, self.full, self.dying = (Path(each.source) for each in self.mounts)
        run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=777", "tmpfs", str(self.full)])
        stack.callback(run, ["umount", "-l", str(self.full)])
        self.node = Namespace()
        stack.callback(self.node.close)
        self.port = names.with_tap(Port(
            "vm@1", "lan", "bridge", user.pw_uid, mac=mac_of("vm", "1"), addresses=("10.1.1.10/16",), node=NODE,
            local=LOCAL, closed=True, own_ports=tuple(range(FIRST, FIRST + len(self.mounts))),
        ))  # fmt: skip
        self.nic = self.node.run(bridge.wnodes_port_attach, self.port)
        stack.callback(self.node.run, bridge.wnodes_port_detach, self.port)
        self.exports = [self.export(index, mount) for index, mount in enumerate(self.mounts)]
        made = {}
        for export in self.exports:
            stack.callback(nfs.wnodes_mount_unexport, export=export)
            made[str(export.index)] = self.node.run(nfs.wnodes_mount_export, export=export)
        self.guest = RealGuest(
            self.node, user, image, self.port, self.nic, mounts=self.mounts[:3], storage=("nfs",), exports=made
        )
        stack.callback(self.end)
        self.guest.wait()
        told = {"port": "dying", "export": made["3"]}
        made = nfs.wnodes_mount_attach(self.mounts[3], "", told, "nfs")
        step = made["guest"][1]
        options = step["argv"][5]
        assert nfs.PATIENCE in options  # here with less of it, for the test's sake
        words = [*step["argv"][:5], options.replace("timeo=100", "timeo=10"), *step["argv"][6:]]
        self.guest.run("sh", "-c", 'mkdir -p "$1" /data && ln -s "$1" /data/dying && shift && exec "$@"', "sh",
                       step["mount"]["stage"], *words)

    def folder(self, name: str) -> Path:
        (self.top / name).mkdir()
        (self.top / name / "file").write_text("of the host")
        for path in (self.top / name, self.top / name / "file"):
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        return self.top / name

    def export(self, index: int, mount: Mount) -> Export:
        return Export(
            lease="vm1", index=index, provider="nfs", source=mount.source, read_only=mount.read_only,
            uid=self.user.pw_uid, gid=self.user.pw_gid, groups=(self.user.pw_gid,), node=NODE, local=LOCAL,
            port=FIRST + index, folder="/run/wnodes-test/exports",
        )  # fmt: skip

    def sh(self, script: str, *, uid: int = 0) -> str:
        """What a script prints in the guest, also when it fails."""
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        return self.guest.run(*become, "sh", "-c", f"exec 2>&1; {script}; true")

    def end(self) -> None:
        if self.guest.folder.exists():
            assert self.guest.close() == []


@pytest.fixture(scope="module")
def site(ordinary_user: Any, minimal_image: Image) -> Iterator[Site]:
    with contextlib.ExitStack() as stack, open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Site(stack, ordinary_user, minimal_image)


def test_a_job_reads_writes_and_owns(site: Site) -> None:
    there = f"cd '/data/{site.home.name.replace(chr(39), chr(39) + chr(92) + chr(39) + chr(39))}'"
    said = site.sh(
        f"{there}; cat file; echo more >>file; umask 027; mkdir d; echo x >d/new; mv d/new d/moved; ln d/moved d/hard;"
        "ln -s moved d/soft; cat d/soft; truncate -s 5 file; touch -d @981173106 d/hard; chmod 600 d/moved;"
        "dd if=/dev/zero of=big bs=64k count=16 status=none; stat -c %s big; rm big; stat -c %u:%a d/hard; echo end",
        uid=site.user.pw_uid,
    )
    assert said.split() == ["of", "the", "hostx", "1048576", f"{site.user.pw_uid}:600", "end"], said
    made = site.home / "d/hard"
    assert (site.home / "file").read_text() == "of th"
    assert (made.stat().st_uid, made.stat().st_nlink, int(made.stat().st_mtime)) == (site.user.pw_uid, 2, 981173106)
    assert stat.S_IMODE((site.home / "d").stat().st_mode) == 0o750


def test_whatever_uid_the_guest_claims_the_host_sees_the_job_s(site: Site) -> None:
    (site.home / "private").write_text("of root")
    (site.home / "private").chmod(0o600)
    there = "cd /data/it*"
    for uid in (0, 1, 2, 60000):
        said = site.sh(f"{there}; cat private; echo x >private; umask 0; echo by >by{uid}; chown 0:0 by{uid}", uid=uid)
        assert "of root" not in said
        assert (site.home / f"by{uid}").stat().st_uid == site.user.pw_uid, said
        assert (site.home / f"by{uid}").stat().st_gid == site.user.pw_gid, said
    assert (site.home / "private").read_text() == "of root"
    site.sh(f"{there}; mkdir evil; mknod evil/null c 1 3; mknod evil/disk b 8 0; cp /bin/true evil/suid; chmod 6755 evil/suid")
    for path in (site.home / "evil").iterdir():
        found = path.lstat()
        assert found.st_uid == site.user.pw_uid and not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode)


def test_read_only_is_the_host_s_word(site: Site) -> None:
    assert site.sh("cat /data/ro/file") == "of the host"
    said = site.sh("echo x >/data/ro/new")
    assert "Read-only" in said
    options = f"vers=4.2,port={FIRST + 1},addr={NODE},clientaddr={LOCAL},proto=tcp,sec=sys"
    said = site.sh(
        f"mkdir -p /mnt/ro; mount -i -t nfs4 -o {options} {NODE}:/share /mnt/ro && echo mounted; cd /mnt/ro;"
        "echo x >new; chmod 777 file; mv file other; rm file; truncate -s 0 file; umount /mnt/ro"
    )
    assert "mounted" in said
    assert sorted(os.listdir(site.read_only)) == ["file"] and (site.read_only / "file").read_text() == "of the host"
    assert stat.S_IMODE((site.read_only / "file").stat().st_mode) == 0o644


def test_links_lead_nowhere_outside(site: Site) -> None:
    secret = site.top / "secret"
    secret.write_text("not for the guest")
    said = site.sh(f"cd /data/it*; ln -s {secret} door; ln -s ../secret back; ln -s / all; cat door back all{secret} ../secret;"
                   f"ln ../secret hard; ls /data/it*/..")  # fmt: skip
    assert "not for the guest" not in said and secret.stat().st_nlink == 1
    (site.home / "turn").mkdir()
    (site.home / "turn/secret").write_text("harmless")
    assert site.sh("cat /data/it*/turn/secret") == "harmless"
    os.rename(site.home / "turn", site.home / "turned")
    os.symlink(site.top, site.home / "turn")
    assert "not for the guest" not in site.sh("cat /data/it*/turn/secret; sleep 2; cat /data/it*/turn/secret; echo x >/data/it*/turn/new")
    assert not (site.top / "new").exists()


_ATTACK = """
import sys
NAME = "guest"
{program}
client = NfsClient({node!r}, {port}, uid={uid}, gid={uid})
for handle in {handles!r}:
    for attempt in (client.read, client.names, lambda it: client.write(it, b"x"), lambda it: client.read(client.find(it, "secret"))):
        try:
            print("GOT", attempt(bytes.fromhex(handle)))
        except NfsError as error:
            print(error.code)
"""


def test_forged_handles_lead_nowhere(site: Site) -> None:
    """From guest root, by a client of its own; the handles that it cannot know are told it here."""
    program = Path(sys.modules[NfsClient.__module__].__file__ or "").read_text().replace("from __future__ import annotations\n", "")

    def attack(handles: list[str], uid: int = 0) -> str:
        words = {"program": program, "node": NODE, "port": FIRST, "uid": uid}
        return site.guest.python(_ATTACK.format(handles=handles, **words))

    own = site.guest.python(f"{program}\nprint(NfsClient({NODE!r}, {FIRST}).handle('share', 'file').hex())").strip()
    assert "GOT b'of th" in attack([own]), "the attack itself works"
    real = bytes.fromhex(own)
    old = host_handle(str(site.home / "file"))
    (site.top / "open").write_text("open to all")
    others = ("closed/secret", "closed", "open", "ro/file", "dying/file", "")
    forgeries = [forged(real, old, host_handle(str(site.top / name))).hex() for name in others]
    for uid in (0, site.user.pw_uid):
        said = attack(forgeries, uid)
        assert "GOT" not in said and said.split().count("70") == 4 * len(others), said
    assert (site.top / "open").read_text() == "open to all"
    # Through /etc of the host, which the gateway's own root does not show.
    assert "GOT" not in attack([forged(real, old, host_handle("/etc/passwd")).hex()])


def test_who_is_not_root_in_the_guest_gets_nothing_by_a_client_of_its_own(site: Site) -> None:
    """All are squashed to the job's user: a second account in its VM would be that user."""
    program = Path(sys.modules[NfsClient.__module__].__file__ or "").read_text().replace("from __future__ import annotations\n", "")
    client = f"{program}\nclient = NfsClient({NODE!r}, {FIRST}, uid={site.user.pw_uid})"
    own = site.guest.run("python3", "-c", f"{client}\nprint(client.handle('share', 'file').hex())").strip()
    for ask, denied in (("client.handle('share', 'file')", 2), (f"client.read(bytes.fromhex({own!r}))", 13)):
        script = f"{client}\ntry:\n    print('GOT', {ask})\nexcept NfsError as error:\n    print(error.code)"
        assert "GOT" in site.guest.run("python3", "-c", script), "the attack itself works"
        for uid in (60000, site.user.pw_uid):
            become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            assert site.guest.run(*become, "python3", "-c", script) == f"{denied}\n"


def test_names_that_the_kernel_forgot_are_found_again(site: Site) -> None:
    (site.home / "cold").mkdir()
    for number in range(20):
        (site.home / f"cold/{number}").write_text(f"{number}\n")
        os.chown(site.home / f"cold/{number}", site.user.pw_uid, -1)
    os.chown(site.home / "cold", site.user.pw_uid, -1)
    said = site.sh("cd /data/it*/cold; cat $(seq 0 19); stat -c %s 7")
    for _ in range(2):
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert site.sh("cd /data/it*/cold; cat $(seq 0 19); stat -c %s 7") == said
        time.sleep(2.5)  # attributes are believed that long
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert site.sh("cd /data/it*/cold; echo more >>3; mv 4 four; cat 3 four; chmod 600 5") == "3\nmore\n4\n"


def test_nobody_else_reaches_the_gateway(site: Site) -> None:
    for address in (NODE, "127.0.0.1", "::1"):
        with pytest.raises(OSError):
            site.node.run(NfsClient, address, FIRST, timeout_s=1)
    site.node.sh("ip", "addr", "add", "169.254.80.5/32", "dev", "lo")  # a user of the node's cannot, but were it so
    try:
        with pytest.raises(OSError):
            site.node.run(NfsClient, NODE, FIRST, timeout_s=1)
    finally:
        site.node.sh("ip", "addr", "del", "169.254.80.5/32", "dev", "lo")
    # Another VM's port is not this one's to use: not even a refusal comes.
    script = f"import socket; socket.create_connection(({NODE!r}, {FIRST + 40}), 2)"
    assert "TimeoutError" in site.sh(f'python3 -c "{script}"'.replace(repr(NODE), f"'{NODE}'"))


def test_a_full_disk_and_a_source_that_vanishes_are_clear_errors(site: Site) -> None:
    who = site.user.pw_uid
    said = site.sh("cd /data/full; dd if=/dev/zero of=x bs=64k count=64 conv=fsync; rm x; echo y >y && cat y", uid=who)
    assert "No space left on device" in said and said.endswith("y\n"), said
    shutil.rmtree(site.read_only)
    said = site.sh("sleep 2.5; cat /data/ro/file; echo over")
    assert re.fullmatch("cat: /data/ro/file: (Stale file handle|No such file or directory)\nover\n", said), said


def test_a_gateway_that_dies_is_an_error_and_the_end_waits_for_nothing(site: Site) -> None:
    """The last test: what is left then."""
    site.sh("cd /data/dying; (while echo line; do sleep 0.02; done >log 2>/tmp/err; echo over >/tmp/over) >/dev/null 2>&1 & true")
    log = site.dying / "log"
    deadline = time.monotonic() + 20
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        site.sh("sync -f /data/dying")
    for process in nfs_ganesha.processes_of(site.exports[3].name)[:1]:
        os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    said = site.guest.run("timeout", "25", "sh", "-c", "ls /data/dying 2>&1; echo code $?; true")
    assert "code 0" not in said, said
    print("answer after", time.monotonic() - began, said)
    assert site.sh("cat /data/it*/turned/secret") == "harmless", "the others go on"
    assert set(log.read_text().split()) == {"line"}
    began = time.monotonic()
    site.end()
    for export in site.exports:
        assert nfs.wnodes_mount_unexport(export=export)
        assert nfs.wnodes_mount_unexport(export=export), "once more"
    assert site.node.run(bridge.wnodes_port_detach, site.port)
    print("end after", time.monotonic() - began)
    assert not [p for export in site.exports for p in nfs_ganesha.processes_of(export.name)]
    assert "wnodes-" not in site.node.sh("nft", "list", "tables")
    assert str(site.home) not in Path("/proc/self/mountinfo").read_text()
