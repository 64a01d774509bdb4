"""What a host has shown once and need not show again: QEMU's capabilities, whether KVM works.

Two places, each trusted only as far as its owner: ``STATE_DIR/backend`` (root's; everybody reads
it) and ``/var/tmp/wnodes-backend-UID`` (the user's own; nobody else ever reads it). So no user can
make another user's VM start from a forged answer. Losing either costs seconds, never correctness.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from wnodes_core.api import errors
from wnodes_core.tools import private_folder, write_atomic

STATE_DIR = "/var/lib/wnodes"
_USER_BASE = "/var/tmp"
_MAX_BYTES = 8 << 20


def shared_folder(state_dir: str | Path = STATE_DIR) -> Path:
    """Root's folder below the state folder."""
    return Path(state_dir) / "backend"


def user_folder(base: str | Path = _USER_BASE) -> Path:
    """The calling user's own folder; local and fast, unlike a home directory."""
    return Path(base) / f"wnodes-backend-{os.getuid()}"


def recall(name: str, state_dir: str | Path = STATE_DIR, base: str | Path = _USER_BASE) -> bytes | None:
    """What was remembered under ``name`` by this user, else by root, else None."""
    for folder, owner in ((user_folder(base), os.getuid()), (shared_folder(state_dir), 0)):
        found = _read(folder, name, owner)
        if found is not None:
            return found
    return None


def remember(name: str, data: bytes, state_dir: str | Path = STATE_DIR, base: str | Path = _USER_BASE) -> bool:
    """Keep ``data`` under ``name``: root for everybody, others for themselves. False if it cannot be kept."""
    with suppress(OSError, errors.HostError):
        if os.getuid() == 0:
            folder = shared_folder(state_dir)
            folder.mkdir(mode=0o755, exist_ok=True)
            write_atomic(folder / name, data, mode=0o644)
        else:
            write_atomic(private_folder(user_folder(base)) / name, data, mode=0o600)
        return True
    return False


def _read(folder: Path, name: str, owner: int) -> bytes | None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not _belongs(os.fstat(fd), owner):
            return None
        file_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    with os.fdopen(file_fd, "rb") as file:
        found = os.fstat(file_fd)
        fits = stat.S_ISREG(found.st_mode) and _belongs(found, owner) and found.st_size <= _MAX_BYTES
        return file.read(_MAX_BYTES) if fits else None


def _belongs(found: os.stat_result, owner: int) -> bool:
    return found.st_uid == owner and not found.st_mode & 0o022
