"""The kernel's NFS server as a gateway: an export a mount, made and taken back with exportfs(8).

Whether a host has that server the site decides, by starting it (``nfs-server.service``): it serves all VMs on one
port. An export is for one address, which the rules of the VM's port leave to that VM; ``subtree_check`` has the kernel
refuse a made-up file handle that leads out of the folder. exports(5), nfsd(7).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from wnodes_core.api import Export
from wnodes_core.errors import CommandError, HostError, NoProvider
from wnodes_core.tools import run

PORT = 2049
_THREADS = "/proc/fs/nfsd/threads"
_MODULE = "wnodes_core.storage.nfs_source"
_TIMEOUT_S = 20.0
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


def there() -> bool:
    """Whether this host's kernel serves NFS."""
    with suppress(OSError, ValueError):
        return int(Path(_THREADS).read_text()) > 0
    return False


def problem() -> str:
    """'' if this host has all that it takes."""
    found = run(["exportfs"], check=False, timeout_s=_TIMEOUT_S) if os.geteuid() == 0 else None
    return "" if found is None or found.exit_code == 0 else f"exportfs: {found.stderr.decode(errors='replace').strip()}"


def options(export: Export) -> str:
    """All squashed; ``mp``: nothing is exported where the mount is not there."""
    own = hashlib.sha256(export.name.encode()).hexdigest()[:32]
    squash = f"all_squash,anonuid={export.uid},anongid={export.gid}"
    return f"{'ro' if export.read_only else 'rw'},{squash},subtree_check,secure,sync,sec=sys,mp,fsid={own}"


def start(export: Export) -> dict[str, Any]:
    """Mount the source where only root comes, and export it to the VM's address. Raises HostError, NoProvider."""
    stop(export)
    os.makedirs(export.folder, mode=0o700, exist_ok=True)
    os.chmod(os.path.dirname(os.path.dirname(export.folder)), 0o700)
    try:
        argv = [sys.executable, "-I", "-m", _MODULE, export.folder]
        run(argv, stdin=json.dumps(export.to_dict()).encode(), timeout_s=_TIMEOUT_S)
    except CommandError as error:
        raise NoProvider(error.stderr_tail.strip() or error.message) from error
    try:
        run(["exportfs", "-o", options(export), f"{export.local}:{export.folder}"], timeout_s=_TIMEOUT_S)
    except CommandError as error:
        raise HostError(f"exportfs: {error.stderr_tail.strip() or error.message}") from error
    return {"port": PORT, "path": export.folder, "node": export.node, "local": export.local}


def stop(export: Export) -> None:
    """Take it back and let the source go; idempotent, and never waits for the source's file system.

    Raises HostError if it is exported still.
    """
    if not os.path.lexists(export.folder):
        return
    run(["exportfs", "-u", f"{export.local}:{export.folder}"], check=False, timeout_s=_TIMEOUT_S)
    left = run(["exportfs", "-s"], check=False, timeout_s=_TIMEOUT_S).text.splitlines()
    if any(line.split()[:1] == [export.folder] for line in left):
        raise HostError(f"{export.folder} is still exported to {export.local}")
    while _libc.umount2(os.fsencode(export.folder), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass
    with suppress(FileNotFoundError):
        os.rmdir(export.folder)
    with suppress(OSError):  # another mount of the lease's may be in it
        os.rmdir(os.path.dirname(export.folder))
