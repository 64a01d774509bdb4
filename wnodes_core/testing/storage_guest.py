"""What a job may do to its files through a mount, and what guest root may not, in a real guest.

The second half of ``storage.StorageContract``. Its author's conftest gives two fixtures: ``guest``,
a booted guest with a free virtio-serial port a mount (``socket``, ``facts``, ``run``), and
``ordinary_user``, an account without rights (as ``pwd`` gives it). The tests run as root.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pwd
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Mount
from wnodes_core.tools import run

Job = Callable[..., str]
MountIt = Callable[..., dict[str, Any]]


def attach_as(user: pwd.struct_passwd, module: str, open_files: int, **asked: Any) -> dict[str, Any]:
    """``wnodes_mount_attach`` in a process of the user's, as the keeper is, with a limit of open files."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            made = importlib.import_module(module).wnodes_mount_attach(**asked)
            os.write(writer, json.dumps({**made, "guest": [{**step, "files": []} for step in made["guest"]]}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        made = json.loads(file.read() or "null")
    os.waitpid(pid, 0)
    assert made, "attach failed: its error is above"
    return dict(made)


class StorageGuestContract:
    """``tells_full_disk``: a full disk of the host is ENOSPC in the job, and not a mere error.

    ``locks_are_apart``: a file may have a lock by flock(2) and one by fcntl(2) at once, as on the host's own disk.
    """

    provider = ""
    name = ""
    tells_full_disk = False
    locks_are_apart = True

    @pytest.fixture(scope="class")
    @classmethod
    def mount_it(cls, guest: Any, ordinary_user: pwd.struct_passwd) -> Iterator[MountIt]:
        """Mount a folder into the guest as the ordinary user; the attachment."""
        attachments = []
        ports = count(1)
        hooks = importlib.import_module(cls.provider)

        def mount(
            source: Path, target: str, *, read_only: bool = False, open_files: int = 1024, **facts: Any
        ) -> dict[str, Any]:
            number = next(ports)
            os.chmod(guest.socket(number), 0o666)
            told = {**guest.facts, "port": f"org.wnodes.mount.{number - 1}", **facts}
            asked = {"mount": Mount(str(source), target, read_only), "guest": told, "provider": cls.name}
            made = attach_as(ordinary_user, cls.provider, open_files, socket_path=guest.socket(number), **asked)
            attachments.append(made)
            for step in made["guest"]:
                done = guest.run(**{**step, **({"files": cls.files(told)} if cls.files(told) else {})})
                assert done.code == 0, done.stderr
            return made

        yield mount
        for made in attachments:
            assert hooks.wnodes_mount_detach(attachment=made)

    @classmethod
    def files(cls, guest: dict[str, Any]) -> list[dict[str, Any]]:
        """The files that a step carries into such a guest (too many for a pipe of the test's)."""
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def top(cls) -> Iterator[Path]:
        """A folder of root's that users may enter; beside the mounted folders lies what is not to be seen."""
        top = Path(tempfile.mkdtemp(prefix="wnodes-src-"))
        top.chmod(0o755)
        (top / "secret").write_text("not for the guest")
        yield top
        shutil.rmtree(top)

    @pytest.fixture(scope="class")
    @classmethod
    def folder_of(cls, top: Path, ordinary_user: pwd.struct_passwd) -> Callable[[str], Path]:
        """A folder of the user's, made if it is not there."""

        def make(name: str) -> Path:
            (top / name).mkdir(exist_ok=True)
            os.chown(top / name, ordinary_user.pw_uid, ordinary_user.pw_gid)
            return top / name

        return make

    @pytest.fixture(scope="class")
    @classmethod
    def home(cls, folder_of: Callable[[str], Path]) -> Path:
        """A folder with an odd name."""
        return folder_of('it\'s a "folder", né:e')

    @pytest.fixture(scope="class")
    @classmethod
    def small(cls, top: Path) -> Iterator[Path]:
        """A folder on a file system of 4 MiB that everybody may write to."""
        (top / "small").mkdir()
        run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=777", "tmpfs", str(top / "small")])
        yield top / "small"
        run(["umount", "-l", str(top / "small")])

    @pytest.fixture(scope="class")
    @classmethod
    def there(cls, mount_it: MountIt, home: Path) -> str:
        """The same folder, mounted at the same path in the guest."""
        mount_it(home, str(home))
        return str(home)

    @pytest.fixture
    def job(self, guest: Any, ordinary_user: pwd.struct_passwd, there: str) -> Job:
        """Run a bash script in the mounted folder as the user, or as guest root; what it printed."""

        def script(text: str, *, umask: int = 0o022, code: int = 0, root: bool = False, cwd: str = there) -> str:
            who = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid, "groups": [ordinary_user.pw_gid]}
            done = guest.run(text, cwd=cwd, umask=umask, **({} if root else who))
            assert done.code == code, (done.code, done.stdout, done.stderr)
            return str((done.stdout + done.stderr).decode(errors="surrogateescape"))

        return script

    # What a job does

    def test_ownership_and_modes(self, job: Job, home: Path, ordinary_user: pwd.struct_passwd) -> None:
        job("touch plain; mkdir folder; umask 0; touch wide; umask 077; touch private; install -m 750 /dev/null tool")
        modes = {p.name: oct(p.stat().st_mode & 0o7777) for p in home.iterdir()}
        assert modes == {"plain": "0o644", "folder": "0o755", "wide": "0o666", "private": "0o600", "tool": "0o750"}
        assert {p.stat().st_uid for p in home.iterdir()} == {ordinary_user.pw_uid}
        assert job("stat -c %u:%g:%a plain").strip() == f"{ordinary_user.pw_uid}:{ordinary_user.pw_gid}:644"
        assert job("./tool; echo runs") == "runs\n"

    def test_rename_over_and_links(self, job: Job, home: Path) -> None:
        out = job(
            "echo a >one; echo b >two; mv -f one two; cat two; ln two hard; ln -s two soft; readlink soft; cat soft;"
            " ln -s /etc/debian_version absolute; readlink absolute; test -s absolute && echo follows"
        )
        assert out.split() == ["a", "two", "a", "/etc/debian_version", "follows"]
        assert (home / "hard").stat().st_ino == (home / "two").stat().st_ino

    def test_an_open_file_that_is_removed_stays_readable(self, job: Job, home: Path) -> None:
        script = (
            'import os; f=open("gone","w+"); f.write("kept"); f.flush(); os.unlink("gone");'
            " f.seek(0); print(f.read(), os.fstat(f.fileno()).st_size)"
        )
        assert job(f"python3 -c '{script}'").split() == ["kept", "4"]
        # Closing is told to the file system after the process has ended: wait for it.
        job('until [ -z "$(ls -A | grep -e gone -e fuse_hidden)" ]; do sleep 0.1; done')
        assert not [p for p in home.iterdir() if p.name.startswith((".fuse", "gone"))]

    def test_truncation_append_and_mtime(self, job: Job, home: Path) -> None:
        job(
            "printf 0123456789 >t; truncate -s 4 t; printf ab >>t; touch -d '2001-02-03 04:05:06 UTC' old;"
            " cp t sparse; truncate -s 1M sparse"
        )
        assert (home / "t").read_text() == "0123ab"
        assert (home / "old").stat().st_mtime == 981173106
        assert (home / "sparse").stat().st_size == 1 << 20

    def test_odd_names(self, job: Job, home: Path) -> None:
        names = ["with space", "quo'te\"s", "new\nline", "ünïcødé", "-dash", "back\\slash", "\udcff\udcfe", "n" * 255]
        for name in names:
            path = os.fsencode(home) + b"/" + os.fsencode(name)
            with open(path, "w") as file:
                file.write("x")
            os.chmod(path, 0o644)
        seen = job("python3 -c \"import os; print(ascii(sorted(os.listdir('.'))))\"")
        assert all(ascii(name) in seen for name in names)

    def test_what_the_host_does_is_seen_within_two_seconds(self, job: Job, home: Path) -> None:
        (home / "gone").touch()
        (home / "news").write_text("old\n")
        assert job("until ls | grep gone; do sleep 0.1; done; cat news; ls made; true").split()[:2] == ["gone", "old"]
        (home / "news").write_text("newer\n")
        (home / "gone").unlink()
        (home / "made").touch()
        began = time.monotonic()
        job('until [ "$(cat news)" = newer ] && ls | grep made && ! ls gone; do sleep 0.1; done')
        assert time.monotonic() - began < 3.5

    def test_big_file_both_ways(self, job: Job, home: Path) -> None:
        out = job("head -c 16M /dev/urandom | tee big | sha256sum; sync; sha256sum <big")
        ours, back = (line.split()[0] for line in out.splitlines())
        assert ours == back == hashlib.sha256((home / "big").read_bytes()).hexdigest()
        (home / "big").unlink()

    def test_locks_and_mapped_files_work(self, job: Job) -> None:
        between = "" if self.locks_are_apart else " fcntl.flock(f, fcntl.LOCK_UN);"
        program = (
            'import fcntl,mmap; f=open("m","w+b"); f.truncate(8192); fcntl.flock(f, fcntl.LOCK_EX);'
            f"{between} fcntl.lockf(f, fcntl.LOCK_EX); m=mmap.mmap(f.fileno(), 8192);"
            ' m[0:5]=b"hello"; m.flush(); print(open("m","rb").read(5))'
        )
        assert "hello" in job(f"python3 -c '{program}'")

    def test_read_only_mount(self, guest: Any, mount_it: MountIt, home: Path) -> None:
        (home / "data").write_text("data")
        mount_it(home, "/data/ro", read_only=True)
        assert guest.run("cat /data/ro/data").stdout == b"data"
        done = guest.run("touch /data/ro/new")
        assert done.code and b"Read-only file system" in done.stderr
        guest.run("mount -o remount,rw /data/ro; echo x >/data/ro/new")
        assert not (home / "new").exists(), "guest root made it writable"

    def test_full_disk_on_the_host_is_an_error_in_the_job(
        self, guest: Any, mount_it: MountIt, small: Path, ordinary_user: pwd.struct_passwd
    ) -> None:
        mount_it(small, "/full")
        who = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid}
        done = guest.run("head -c 16M /dev/zero >/full/x; echo code $?; rm /full/x; echo y >/full/y", **who)
        assert b"code 1" in done.stdout, done
        assert not self.tells_full_disk or b"No space left" in done.stderr
        assert (small / "y").read_text() == "y\n", "it works again once there is room"
