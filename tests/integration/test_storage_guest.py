"""A folder of the host in a real guest: what a job may do to its files, done there, seen here."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.model import Mount
from wnodes_core.storage import sshfs

pytestmark = pytest.mark.guest
_ports = count(1)


def attach_as(user: pwd.struct_passwd, mount: Mount, socket_path: str, guest: dict[str, Any]) -> dict[str, Any]:
    """Attach in a process of the user's, as the keeper is."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            made = sshfs.wnodes_mount_attach(mount, socket_path, guest)
            os.write(writer, json.dumps({**(made or {}), "guest": []}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        attachment: dict[str, Any] = json.load(file)
    os.waitpid(pid, 0)
    attachment["guest"] = sshfs.guest_steps(mount, guest)
    return attachment


@pytest.fixture(scope="module")
def mount_it(guest: Any, ordinary_user: pwd.struct_passwd) -> Iterator[Callable[..., None]]:
    """Mount a folder into the guest as the ordinary user."""
    attachments = []

    def mount(source: Path, target: str, *, read_only: bool = False, own_tools: bool = False) -> None:
        number = next(_ports)
        path = guest.socket(number)
        os.chmod(path, 0o666)
        facts = {**guest.facts, "port": f"org.wnodes.mount.{number - 1}"}
        if own_tools:
            facts["sshfs"] = False
        attachment = attach_as(ordinary_user, Mount(str(source), target, read_only), path, facts)
        attachments.append(attachment)
        (step,) = attachment["guest"]
        done = guest.run(**step)
        assert done.code == 0, done.stderr

    yield mount
    for attachment in attachments:
        sshfs.wnodes_mount_detach(attachment)


@pytest.fixture(scope="module")
def home(ordinary_user: pwd.struct_passwd) -> Iterator[Path]:
    """A folder of the user's with an odd name, reachable by the user."""
    top = Path(tempfile.mkdtemp(prefix="wnodes-src-"))
    top.chmod(0o755)
    folder = top / "it's a \"folder\", né:e"
    folder.mkdir()
    os.chown(folder, ordinary_user.pw_uid, ordinary_user.pw_gid)
    yield folder
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def there(mount_it: Callable[..., None], home: Path) -> str:
    """The same folder, mounted at the same path in the guest."""
    mount_it(home, str(home))
    return str(home)


@pytest.fixture
def job(guest: Any, ordinary_user: pwd.struct_passwd, there: str) -> Callable[..., str]:
    """Run a bash script in the mounted folder as the user; returns what it printed."""

    def run(script: str, *, umask: int = 0o022, code: int = 0) -> str:
        who = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid, "groups": [ordinary_user.pw_gid]}
        done = guest.run(script, cwd=there, umask=umask, **who)
        assert done.code == code, (done.code, done.stdout, done.stderr)
        return str(done.stdout.decode())

    return run


Job = Callable[..., str]


def test_ownership_and_modes(job: Job, home: Path, ordinary_user: pwd.struct_passwd) -> None:
    job("touch plain; mkdir folder; umask 0; touch wide; umask 077; touch private; install -m 750 /dev/null tool")
    modes = {p.name: oct(p.stat().st_mode & 0o7777) for p in home.iterdir()}
    assert modes == {"plain": "0o644", "folder": "0o755", "wide": "0o666", "private": "0o600", "tool": "0o750"}
    assert {p.stat().st_uid for p in home.iterdir()} == {ordinary_user.pw_uid}
    assert job("stat -c %u:%g:%a plain").strip() == f"{ordinary_user.pw_uid}:{ordinary_user.pw_gid}:644"
    assert job("stat -c %u / ; ./tool").split()[0] == "0"


def test_rename_over_and_links(job: Job, home: Path) -> None:
    out = job("echo a >one; echo b >two; mv -f one two; cat two; ln two hard; ln -s two soft; readlink soft; cat soft;"
              " ln -s /etc/debian_version absolute; readlink absolute; test -s absolute && echo follows")  # fmt: skip
    assert out.split() == ["a", "two", "a", "/etc/debian_version", "follows"]
    # SFTP version 3 tells no link count, so the guest shows 1; on the host it is one file.
    assert (home / "hard").stat().st_ino == (home / "two").stat().st_ino


def test_an_open_file_that_is_removed_stays_readable(job: Job, home: Path) -> None:
    script = 'import os; f=open("gone","w+"); f.write("kept"); f.flush(); os.unlink("gone"); f.seek(0); print(f.read(), os.fstat(f.fileno()).st_size)'
    assert job(f"python3 -c '{script}'").split() == ["kept", "4"]
    # Closing is told to the file system after the process has ended: wait for it.
    job("until [ -z \"$(ls -A | grep -e gone -e fuse_hidden)\" ]; do sleep 0.1; done")
    assert not [p for p in home.iterdir() if p.name.startswith((".fuse", "gone"))]


def test_truncation_append_and_mtime(job: Job, home: Path) -> None:
    job("printf 0123456789 >t; truncate -s 4 t; printf ab >>t; touch -d '2001-02-03 04:05:06 UTC' old; cp t sparse; truncate -s 1M sparse")
    assert (home / "t").read_text() == "0123ab"
    assert (home / "old").stat().st_mtime == 981173106
    assert (home / "sparse").stat().st_size == 1 << 20


def test_odd_names(job: Job, home: Path) -> None:
    names = ["with space", "quo'te\"s", "new\nline", "ünïcødé", "-dash", "back\\slash", "\udcff\udcfe", "n" * 255]
    for name in names:
        path = os.fsencode(home) + b"/" + os.fsencode(name)
        with open(path, "w") as file:
            file.write("x")
        os.chmod(path, 0o644)
    program = "import os,sys; print(ascii(sorted(os.listdir('.'))))"
    seen = job(f'python3 -c "{program}"')
    assert all(ascii(name) in seen for name in names)


def test_what_the_host_writes_is_seen_within_two_seconds(job: Job, home: Path) -> None:
    (home / "news").write_text("old")
    assert job("cat news") == "old"
    (home / "news").write_text("newer")
    began = time.monotonic()
    job("until [ \"$(cat news)\" = newer ]; do sleep 0.1; done")
    assert time.monotonic() - began < 3.5


def test_big_file_both_ways(job: Job, home: Path) -> None:
    out = job("head -c 64M /dev/urandom | tee big | sha256sum; sync; sha256sum <big")
    ours, back = (line.split()[0] for line in out.splitlines())
    import hashlib

    assert ours == back == hashlib.sha256((home / "big").read_bytes()).hexdigest()
    (home / "big").unlink()


def test_the_hosts_refusal_is_the_jobs_error(job: Job, home: Path) -> None:
    (home / "roots").write_text("secret")
    os.chmod(home / "roots", 0o600)
    assert "Permission denied" in job("cat roots 2>&1", code=1)
    assert "Permission denied" in job("echo x 2>&1 >roots || true; (echo x >roots) 2>&1", code=1)
    os.unlink(home / "roots")


def test_locks_and_mapped_files_work(job: Job) -> None:
    program = (
        'import fcntl,mmap; f=open("m","w+b"); f.truncate(8192); fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX);'
        ' m=mmap.mmap(f.fileno(), 8192); m[0:5]=b"hello"; m.flush(); print(open("m","rb").read(5))'
    )
    assert "hello" in job(f"python3 -c '{program}'")


def test_read_only_mount(guest: Any, mount_it: Callable[..., None], home: Path) -> None:
    (home / "data").write_text("data")
    mount_it(home, "/data/ro", read_only=True)
    assert guest.run("cat /data/ro/data").stdout == b"data"
    done = guest.run("touch /data/ro/new")
    assert done.code and b"Read-only file system" in done.stderr


def test_full_disk_on_the_host_is_enospc_in_the_job(
    guest: Any, mount_it: Callable[..., None], ordinary_user: pwd.struct_passwd, request: pytest.FixtureRequest
) -> None:
    import subprocess

    small = Path(tempfile.mkdtemp(prefix="wnodes-full-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=777", "tmpfs", str(small)], check=True)

    def away() -> None:
        subprocess.run(["umount", "-l", str(small)], check=True)
        small.rmdir()

    request.addfinalizer(away)
    mount_it(small, "/full")
    done = guest.run("head -c 16M /dev/zero >/full/x; echo code $?", uid=ordinary_user.pw_uid, gid=ordinary_user.pw_gid)
    text = (done.stdout + done.stderr).decode()
    assert "code 1" in text, text
    # SFTP version 3 has no status for a full disk: the job sees an input/output or generic error.
    assert "error" in text.lower() or "fail" in text.lower() or "permitted" in text.lower() or "space" in text.lower()


def test_guest_without_sshfs_mounts_with_the_hosts(guest: Any, mount_it: Callable[..., None], home: Path) -> None:
    (home / "data").write_text("data")
    mount_it(home, "/own tools", own_tools=True)
    assert guest.run("cat '/own tools/data'").stdout == b"data"
    assert b"/usr/lib/wnodes/tools/" in guest.run("cat /proc/*/cmdline | tr '\\0' ' '").stdout
