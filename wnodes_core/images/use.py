"""Who uses an image: marks of leases, locks of processes, and access to restricted images.

An image is in use while a lease has marked it, while a process holds a shared ``flock`` on its
file (``hold``), or while QEMU has it open (QEMU takes open-file-description locks).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wnodes_core import command
from wnodes_core.errors import BadRequest, CommandError, SettingsError
from wnodes_core.files import write_atomic
from wnodes_core.images.layout import Layout

_LEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_HOLD_S = 1.0
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux, fcntl_locking(2)


def mark(layout: Layout, digest: str, lease: str, uid: int) -> None:
    """Record that a lease uses a blob; idempotent. Raises StateDirFull."""
    if not _LEASE.match(lease):
        raise BadRequest(f"lease {lease!r}: want letters, digits, '.', '_' and '-'")
    layout.use(digest).mkdir(mode=0o700, exist_ok=True)
    write_atomic(layout.use(digest) / lease, json.dumps({"uid": uid, "at": time.time()}).encode())


def unmark(layout: Layout, digest: str, lease: str) -> None:
    """Take a lease's mark away; idempotent."""
    with suppress(FileNotFoundError):
        os.unlink(layout.use(digest) / lease)
    with suppress(OSError):  # other leases still use it
        os.rmdir(layout.use(digest))


def marks(layout: Layout) -> dict[str, dict[str, int]]:
    """Every mark: digest -> lease -> uid of the lease's user (-1 for an unreadable mark)."""
    return {f"sha256:{folder.name}": _leases(folder) for folder in _children(layout.root / "use")}


def _leases(folder: Path) -> dict[str, int]:
    found = {}
    for path in _children(folder):
        if not path.name.startswith("."):
            found[path.name] = -1
            with suppress(OSError, ValueError, KeyError, TypeError):
                found[path.name] = int(json.loads(path.read_bytes())["uid"])
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def drop_dead(layout: Layout, living: Collection[str]) -> list[str]:
    """Take away the marks and the access of every lease that is not in ``living``; who they were."""
    dead = set()
    for digest, leases in marks(layout).items():
        for lease, uid in leases.items():
            if lease not in living:
                dead.add(lease)
                unmark(layout, digest, lease)
                revoke(layout, digest, uid)
    return sorted(dead)


@contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Keep a blob from being purged while this process lives, without any right to write.

    A purge asks for the lock for an instant. Whoever keeps it longer has no business with it, and
    whoever may read the blob can: then we go on without.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _HOLD_S
        while not _shared(fd) and time.monotonic() < until:
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _shared(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def user_of(layout: Layout, digest: str) -> str:
    """Who uses a blob, in words; '' if nobody does."""
    leases = _leases(layout.use(digest))
    if leases:
        return "lease " + ", ".join(sorted(leases))
    try:
        fd = os.open(layout.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
        return "" if answer[0] == fcntl.F_UNLCK else "a running QEMU"
    except BlockingIOError:
        return "a process that holds it"
    finally:
        os.close(fd)


def grant(layout: Layout, digest: str, uid: int) -> None:
    """Let a user read the blob of a restricted image; idempotent. Raises SettingsError."""
    _setfacl(layout.blob(digest), "-m", f"u:{uid}:r")


def revoke(layout: Layout, digest: str, uid: int) -> None:
    """End a user's access once no marked lease of that user is left; idempotent. Raises SettingsError."""
    if uid >= 0 and layout.blob(digest).exists() and uid not in _leases(layout.use(digest)).values():
        _setfacl(layout.blob(digest), "-x", f"u:{uid}")


def _setfacl(path: Path, *change: str) -> None:
    try:
        command.run(["setfacl", *change, "--", str(path)], timeout_s=10)
    except CommandError as error:
        raise SettingsError(
            f"{path}: no access list can be set: {error.stderr_tail.strip()}",
            hint="restricted images want the package acl and a file system with POSIX access lists",
        ) from error
