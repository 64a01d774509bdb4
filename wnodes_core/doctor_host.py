"""Facts about this machine, for ``doctor``: one small door each, so that tests can fake them all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnodes_core import command
from wnodes_core.errors import NoProvider, WnodesError
from wnodes_core.settings import Settings
from wnodes_core.settings.scratch import ScratchSettings

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


@dataclass(frozen=True)
class Space:
    """A file system: type, where it is mounted, bytes free for us, bytes in all."""

    kind: str
    mounted_at: str
    free: int
    total: int


class Host:
    """The real machine."""

    def text(self, path: str) -> str:
        """A small file's text, '' if it cannot be read."""
        with suppress(OSError):
            return Path(path).read_text(errors="replace")[: 1 << 20]
        return ""

    def stat(self, path: str) -> os.stat_result | None:
        """The file's facts, None if there is no such file."""
        with suppress(OSError):
            return os.stat(path)
        return None

    def node_name(self) -> str:
        """What this node is called, as batch systems mostly do."""
        return os.uname().nodename.partition(".")[0]

    def can_use(self, path: str) -> bool:
        """Whether we may read and write it."""
        return os.access(path, os.R_OK | os.W_OK)

    def program(self, *names: str) -> str:
        """The path of the first of these programs (names or absolute paths) that is there, or ''."""
        return next((found for name in names if (found := shutil.which(name, path=command.PATH))), "")

    def glob(self, pattern: str) -> list[str]:
        """Paths that match a pattern below ``/``."""
        return [str(path) for path in Path("/").glob(pattern.lstrip("/"))]

    def module(self, name: str) -> bool:
        """Whether a Python module is installed."""
        from importlib.util import find_spec

        return find_spec(name) is not None

    def space(self, path: str) -> Space:
        """The file system that holds ``path``, or will hold it when it is made."""
        at = existing(path)
        stats = os.statvfs(at)
        kind, point = mount_of(os.path.realpath(at), self.text("/proc/self/mountinfo"))
        return Space(kind, point, stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize)

    def direct_io(self, path: str) -> bool | None:
        """Whether files below ``path`` can be opened with O_DIRECT; None if we cannot write there."""
        name = Path(existing(path), f".wnodes-doctor-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError:
            return None
        try:
            os.close(os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
        except OSError:
            return False
        finally:
            os.unlink(name)
        return True

    def landlock(self) -> int:
        """The kernel's Landlock ABI, 0 if it has none."""
        from wnodes_core.storage import confine

        return confine.abi()

    def storage(self, settings: Settings) -> dict[str, str]:
        """Every storage provider: '' or why it cannot serve mounts here."""
        from wnodes_core.plugins import Plugins

        hook = Plugins(disabled=settings.plugins.disabled).hook
        return {each["provider"]: each["problem"] for each in reversed(hook.wnodes_mount_usable())}

    def volumes(self, scratch: ScratchSettings) -> list[tuple[str, str]]:
        """What is wrong with the volume group and the thin pool of the settings. Raises WnodesError."""
        from wnodes_core.storage import lvm

        return lvm.problems(scratch.group, scratch.pool)

    def clock_synchronised(self) -> bool | None:
        """Whether the kernel believes its clock; None if it does not say."""
        timex = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; modes = 0 only asks
        state = int(ctypes.CDLL(None).adjtimex(timex))
        return None if state < 0 else state != _TIME_ERROR

    def daemon(self, path: str) -> dict[str, Any] | None:
        """What wnodesd says of itself, None if there is no socket. Raises TransientError."""
        from wnodes_core.agent import client

        return client.call({"op": "status"}, path=path, timeout_s=5) if os.path.exists(path) else None

    def probe(self, settings: Settings) -> dict[str, Any]:
        """The backend's answer on this host, remembered by it. Raises WnodesError."""
        import tempfile

        from wnodes_core.plugins import Plugins

        hook = Plugins(disabled=settings.plugins.disabled).hook
        with tempfile.TemporaryDirectory(prefix="wnodes-doctor-", dir="/var/tmp") as folder:
            answer: dict[str, Any] | None = hook.wnodes_vm_probe(accel=settings.accel, folder=folder)
        if answer is None:
            raise NoProvider("no hypervisor backend is installed")
        return answer

    def adapters(self) -> dict[str, str]:
        """Every installed adapter: '' or why it does not load."""
        from importlib.metadata import entry_points

        from wnodes_core.plugins import LRMS_GROUP, Plugins

        found = {}
        for entry in entry_points(group=LRMS_GROUP):
            try:
                Plugins(lrms=entry.name, builtins=(), scan=False)
                found[entry.name] = ""
            except WnodesError as error:
                found[entry.name] = error.message
        return found


def existing(path: str) -> str:
    """The path itself, or the nearest folder above that exists."""
    while not os.path.exists(path) and path != "/":
        path = os.path.dirname(path)
    return path


def mount_of(path: str, mountinfo: str) -> tuple[str, str]:
    """(file system type, mount point) of a path, by ``/proc/self/mountinfo`` (proc(5)).

    >>> mount_of("/run/wnodes", "1 0 0:1 / / rw - ext4 a rw\\n2 1 0:2 / /run rw - tmpfs b rw\\n")
    ('tmpfs', '/run')
    """
    best = ("?", "/")
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        words = before.split(" ")
        if not dash or len(words) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[1]):
            best = (after.split(" ")[0], point)
    return best
