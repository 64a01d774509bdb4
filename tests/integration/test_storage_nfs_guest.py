"""The NFS gateway in a real guest: the storage contract on a bridge, guest root hostile, its gateway failing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from netns_kit import Namespace  # noqa: E402
from network_guests import RealGuest  # noqa: E402
from storage_guests import Served  # noqa: E402

from wnodes_core.api import Export, Image, Mount, Port, mac_of  # noqa: E402
from wnodes_core.network import bridge, names  # noqa: E402
from wnodes_core.storage import nfs, nfs_ganesha  # noqa: E402
from wnodes_core.testing.nfs_client import NfsClient, forged, host_handle  # noqa: E402
from wnodes_core.testing.storage_attacks import StorageAttacks, StorageFaults  # noqa: E402
from wnodes_core.testing.storage_guest import Job, MountIt  # noqa: E402

pytestmark = [pytest.mark.guest, pytest.mark.net]
NODE, LOCAL, FIRST, MOST = "169.254.77.1", "169.254.80.5", 256, 8


class Site:
    """A node with a lease some of whose mounts are there from the start, and the lease's guest."""

    def __init__(
        self, stack: contextlib.ExitStack, user: pwd.struct_passwd, image: Image, mounts: tuple[Mount, ...]
    ) -> None:
        self.user, self.mounts, self.stack = user, mounts, stack
        self.exports: list[Export] = []
        self.node = Namespace()
        stack.callback(self.node.close)
        self.port = names.with_tap(Port(
            "vm@1", "lan", "bridge", user.pw_uid, mac=mac_of("vm", "1"), addresses=("10.1.1.10/16",), node=NODE,
            local=LOCAL, closed=True, own_ports=tuple(range(FIRST, FIRST + MOST)),
        ))  # fmt: skip
        nic = self.node.run(bridge.wnodes_port_attach, self.port)
        stack.callback(self.node.run, bridge.wnodes_port_detach, self.port)
        made = {str(index): self.serve(mount) for index, mount in enumerate(mounts)}
        self.real = RealGuest(self.node, user, image, self.port, nic, mounts=mounts, storage=("nfs",), exports=made)
        stack.callback(self.end)
        self.real.wait()
        self.guest = Served(self.real)

    def serve(self, mount: Mount, open_files: int = 0) -> dict[str, Any]:
        """As wnodesd does it."""
        index = len(self.exports)
        export = Export(
            lease=f"vm{os.getpid()}", index=index, provider="nfs", source=mount.source, read_only=mount.read_only,
            uid=self.user.pw_uid, gid=self.user.pw_gid, groups=(self.user.pw_gid,), node=NODE, local=LOCAL,
            port=FIRST + index, folder="/run/wnodes-test/exports",
        )  # fmt: skip
        self.exports.append(export)
        self.stack.callback(nfs.wnodes_mount_unexport, export=export)
        if open_files:
            return dict(self.node.run(export_with, open_files, export))
        return dict(self.node.run(nfs.wnodes_mount_export, export=export))

    def attach(self, mount: Mount, options: Callable[[str], str] = str, *, open_files: int = 0) -> Export:
        """A mount more, while the guest runs."""
        served = self.serve(mount, open_files)
        export = self.exports[-1]
        made = nfs.wnodes_mount_attach(mount, "", {"port": f"m{export.index}", "export": served}, "nfs")
        assert made is not None
        for step in made["guest"]:
            done = self.guest.run(**{**step, "argv": [options(word) for word in step["argv"]]})
            assert done.code == 0, done
        return export

    def sh(self, script: str, *, uid: int = 0) -> str:
        """What a script prints in the guest, also when it fails."""
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        return self.real.run(*become, "sh", "-c", f"exec 2>&1; {script}; true")

    def end(self) -> None:
        if self.real.folder.exists():
            assert self.real.close() == []


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


class TestNfs(StorageAttacks):
    provider, name = "wnodes_core.storage.nfs", "nfs"
    tells_full_disk = True
    locks_are_apart = False  # NFS knows one kind: Linux makes fcntl's out of flock's (fs/nfs/file.c)

    @pytest.fixture(scope="class")
    @classmethod
    def top(cls) -> Iterator[Path]:
        """As the contract's, on the disk, and beside the mounts a folder that the job's user may not enter."""
        with tempfile.TemporaryDirectory(prefix="wnodes-src-", dir="/var/tmp") as folder:
            top = Path(folder)
            top.chmod(0o755)
            (top / "secret").write_text("not for the guest")
            (top / "closed").mkdir(mode=0o700)
            (top / "closed/secret").write_text("of another user")  # readable, but for its folder
            yield top

    @pytest.fixture(scope="class")
    @classmethod
    def site(
        cls, ordinary_user: pwd.struct_passwd, minimal_image: Image, home: Path, small: Path,
        folder_of: Callable[[str], Path],
    ) -> Iterator[Site]:  # fmt: skip
        kept = (Mount(str(home), str(home)), Mount(str(home), "/data/ro", True), Mount(str(small), "/full"))
        kept += (Mount(str(folder_of("vanishing")), "/vanishing"),)
        with contextlib.ExitStack() as stack, open(LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Site(stack, ordinary_user, minimal_image, kept)

    @pytest.fixture(scope="class")
    @classmethod
    def guest(cls, site: Site) -> Served:
        return site.guest

    @pytest.fixture(scope="class")
    @classmethod
    def mount_it(cls, site: Site) -> MountIt:
        """Make sure of a mount that was there from the start, or have one more."""

        def mount(source: Path, target: str, *, read_only: bool = False, open_files: int = 0) -> dict[str, Any]:
            wanted = Mount(str(source), target, read_only)
            if wanted not in site.mounts:
                site.attach(wanted, open_files=open_files)
            return {}

        return mount

    test_files_held_open = StorageFaults.test_files_held_open_run_out_with_an_error_and_come_back

    def test_files_that_are_there_held_open_run_out_too(
        self, guest: Served, mount_it: MountIt, folder_of: Callable[[str], Path], ordinary_user: pwd.struct_passwd
    ) -> None:
        """Those the server is handed open: when it has no room for one more, that is its client's error."""
        there = folder_of("handed")
        for number in range(100):
            (there / str(number)).touch()
            os.chown(there / str(number), ordinary_user.pw_uid, ordinary_user.pw_gid)
        mount_it(there, "/handed", open_files=64)
        program = """
import os
held, failed = [], 0
for n in range(100):
    try:
        held.append(os.open("/handed/%d" % n, os.O_RDONLY))
    except OSError:
        failed += 1
print(len(held), failed)
"""
        held, failed = map(int, guest.run(["python3", "-c", program]).stdout.split())
        assert held > 20 and failed > 20
        assert guest.run("cd /handed; cat 1; echo again >1; cat 1").stdout == b"again\n"

    def test_a_lock_holds_on_the_host_too(self, job: Job, home: Path) -> None:
        program = "import fcntl, time; f=open('held', 'w'); fcntl.flock(f, fcntl.LOCK_EX); open('/tmp/locked', 'w'); time.sleep(5)"
        job(f'python3 -c "{program}" >/dev/null 2>&1 & until [ -e /tmp/locked ]; do sleep 0.05; done')
        with open(home / "held", "r+b") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_whatever_uid_the_guest_claims_the_host_sees_the_job_s(self, site: Site, home: Path) -> None:
        for uid in (0, 1, 2, 60000):
            script = f"cd {home.parent}/it*; umask 0; echo by >by{uid}; chown 0:0 by{uid}"
            said = site.sh(script, uid=uid)
            assert (home / f"by{uid}").stat().st_uid == site.user.pw_uid, said
            assert (home / f"by{uid}").stat().st_gid == site.user.pw_gid, said

    def test_read_only_is_the_host_s_word(self, site: Site, home: Path, ordinary_user: pwd.struct_passwd) -> None:
        """By a mount of guest root's own, who does not say that it is."""
        (home / "kept").write_text("kept")
        os.chown(home / "kept", ordinary_user.pw_uid, ordinary_user.pw_gid)
        before = sorted(os.listdir(home))
        options = f"vers=4.2,port={FIRST + 1},addr={NODE},clientaddr={LOCAL},proto=tcp,sec=sys"
        said = site.sh(
            f"mkdir -p /mnt/ro; mount -i -t nfs4 -o {options} {NODE}:/share /mnt/ro && echo mounted; cd /mnt/ro; cat kept;"
            "echo x >new; chmod 777 kept; mv kept other; rm kept; truncate -s 0 kept; cd /; umount /mnt/ro"
        )
        assert said.startswith("mounted\nkept") and said.count("Read-only file system") == 5, said
        assert sorted(os.listdir(home)) == before
        assert ((home / "kept").read_text(), (home / "kept").stat().st_mode & 0o777) == ("kept", 0o644)

    def test_forged_handles_lead_nowhere(self, site: Site, home: Path, top: Path, folder_of: Any) -> None:
        """From guest root, by a client of its own; the handles that it cannot know are told it here."""
        program = Path(sys.modules[NfsClient.__module__].__file__ or "").read_text()
        program = program.replace("from __future__ import annotations\n", "")

        both = ", ".join(f"NfsClient({NODE!r}, {FIRST + number}).server" for number in (0, 1))
        assert len(set(site.real.python(f"{program}\nprint(*[{both}], sep=chr(10))").splitlines())) == 2, "one is not taken for the other"

        def attack(handles: list[str], uid: int = 0) -> str:
            words = {"program": program, "node": NODE, "port": FIRST, "uid": uid}
            return site.real.python(_ATTACK.format(handles=handles, **words))

        (home / "file").write_text("of the job")
        os.chown(home / "file", site.user.pw_uid, site.user.pw_gid)
        own = site.real.python(f"{program}\nprint(NfsClient({NODE!r}, {FIRST}).handle('share', 'file').hex())").strip()
        assert "GOT b'of th" in attack([own]), "the attack itself works"
        real = bytes.fromhex(own)
        old = host_handle(str(home / "file"))
        (top / "open").write_text("open to all")
        (folder_of("other") / "file").write_text("of another mount")
        others = ("closed/secret", "closed", "open", "other", "other/file", "")
        forgeries = [forged(real, old, host_handle(str(top / name))).hex() for name in others]
        for uid in (0, site.user.pw_uid):
            said = attack(forgeries, uid)
            assert "GOT" not in said and said.split().count("70") == 4 * len(others), said
        assert (top / "open").read_text() == "open to all"
        # Through /etc of the host, which the gateway's own root does not show.
        assert "GOT" not in attack([forged(real, old, host_handle("/etc/passwd")).hex()])

    def test_who_is_not_root_in_the_guest_gets_nothing_by_a_client_of_its_own(self, site: Site, home: Path) -> None:
        """All are squashed to the job's user: a second account in its VM would be that user."""
        (home / "file").write_text("of the job")
        os.chown(home / "file", site.user.pw_uid, site.user.pw_gid)
        program = Path(sys.modules[NfsClient.__module__].__file__ or "").read_text()
        program = program.replace("from __future__ import annotations\n", "")
        client = f"{program}\nclient = NfsClient({NODE!r}, {FIRST}, uid={site.user.pw_uid})"
        own = site.real.python(f"{client}\nprint(client.handle('share', 'file').hex())").strip()
        for ask, denied in (("client.handle('share', 'file')", 2), (f"client.read(bytes.fromhex({own!r}))", 13)):
            script = f"{client}\ntry:\n    print('GOT', {ask})\nexcept NfsError as error:\n    print(error.code)"
            assert "GOT" in site.real.python(script), "the attack itself works"
            for uid in (60000, site.user.pw_uid):
                become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
                assert site.real.run(*become, "python3", "-c", script) == f"{denied}\n"

    def test_names_that_the_kernel_forgot_are_found_again(self, site: Site, job: Job, home: Path) -> None:
        (home / "cold").mkdir()
        for number in range(20):
            (home / f"cold/{number}").write_text(f"{number}\n")
            os.chown(home / f"cold/{number}", site.user.pw_uid, -1)
        os.chown(home / "cold", site.user.pw_uid, -1)
        look = "cd cold; ls; cat $(seq 0 19); stat -c %s 7"
        said = job(look)
        for _ in range(2):
            Path("/proc/sys/vm/drop_caches").write_text("2")
            site.sh("echo 3 >/proc/sys/vm/drop_caches")
            time.sleep(1.5)  # the server believes attributes for 1 s
            assert job(look) == said
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert job("cd cold; echo more >>3; mv 4 four; cat 3 four; chmod 600 5") == "3\nmore\n4\n"

    def test_nobody_else_reaches_the_gateway(self, site: Site) -> None:
        for address in (NODE, "127.0.0.1", "::1"):
            with pytest.raises(OSError):
                site.node.run(NfsClient, address, FIRST, timeout_s=0.5)
        # A user of the node's cannot, but were it so:
        site.node.sh("ip", "addr", "add", "169.254.80.5/32", "dev", "lo")
        try:
            with pytest.raises(OSError):
                site.node.run(NfsClient, NODE, FIRST, timeout_s=0.5)
        finally:
            site.node.sh("ip", "addr", "del", "169.254.80.5/32", "dev", "lo")
        # Another VM's port is not this one's to use: not even a refusal comes.
        assert "TimeoutError" in site.sh(
            f"python3 -c \"import socket; socket.create_connection(('{NODE}', {FIRST + 40}), 1)\""
        )

    def test_a_gateway_that_dies_is_an_error_and_the_end_waits_for_nothing(
        self, site: Site, job: Job, folder_of: Callable[[str], Path]
    ) -> None:
        """The last test: what is left then."""
        dying = folder_of("dying")
        # With less patience, for the test's sake.
        export = site.attach(
            Mount(str(dying), "/dying"), lambda word: word.replace(nfs.PATIENCE, "soft,timeo=10,retrans=2")
        )
        job(
            "(while echo line; do sleep 0.02; done >log 2>/tmp/err; echo over >/tmp/over) >/dev/null 2>&1 &",
            cwd="/dying",
        )
        log = dying / "log"
        deadline = time.monotonic() + 20
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            site.sh("sync -f /dying")
        for process in nfs_ganesha.processes_of(export.name)[:1]:
            os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        done = site.guest.run("timeout 25 ls /dying")
        assert done.code == 2, done
        print("answer after", time.monotonic() - began, done)
        assert job("echo on >on; cat on") == "on\n", "the others go on"
        assert set(log.read_text().split()) == {"line"}
        began = time.monotonic()
        site.end()
        for each in site.exports:
            assert nfs.wnodes_mount_unexport(export=each)
            assert nfs.wnodes_mount_unexport(export=each), "once more"
        assert site.node.run(bridge.wnodes_port_detach, site.port)
        print("end after", time.monotonic() - began)
        assert not [found for each in site.exports for found in nfs_ganesha.processes_of(each.name)]
        assert "wnodes-" not in site.node.sh("nft", "list", "tables")
        assert str(dying) not in Path("/proc/self/mountinfo").read_text()


def export_with(open_files: int, export: Export) -> dict[str, Any]:
    """In a process with such a limit, which in a container nobody may raise again."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
            os.write(writer, json.dumps(nfs.wnodes_mount_export(export=export)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        made = json.loads(file.read() or "{}")
    os.waitpid(pid, 0)
    return dict(made)
