"""Where a node's (or a user's) templates are kept, found, checked and thrown away.

::

    ROOT/ID/template.json    what it is, and what its files looked like when they were put here
    ROOT/ID/…                memory, state, argv, disk: written once, only ever read
    ROOT/building-ID-…/      a builder's folder; ``made.json`` is its last word
    ROOT/.lock-ID            who builds (flock)
    ROOT/.failed-ID          why the last build failed, and when

A template appears by one rename. It may go at any time: clones have its files open, and a clone that
comes too late is booted instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wnodes_core.errors import ImageError, WnodesError, from_dict
from wnodes_core.files import full_disk_is_host_error, remove_tree, sync_folder, write_atomic
from wnodes_core.model import Template

log = logging.getLogger(__name__)

MANIFEST, MADE = "template.json", "made.json"
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{16}\Z")
_READ_WHOLE = 4 << 20  # files up to here are compared by their content at each use
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Kept:
    """A template on the shelf: ``used`` (seconds since the epoch) and ``mib`` of disk are for tables and purges."""

    template: Template
    used: float
    mib: int


class Shelf:
    """The templates below one folder. Everything blocks for milliseconds at most."""

    def __init__(self, root: str | Path, *, max_templates: int = 8, max_mib: int = 16384) -> None:
        self.root = Path(root)
        self._max_templates = max_templates
        self._max_mib = max_mib

    def make(self) -> None:
        """Make the folder, and those above it. The node's may be walked by all: its templates are opened one by one."""
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.is_dir()]
        with full_disk_is_host_error(self.root):
            for folder in reversed(missing):  # a user's own state folder may be one of them
                folder.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)

    def find(self, template_id: str) -> Template | None:
        """The template of that id, checked; None if there is none. One that is wrong is thrown away."""
        folder = self.root / template_id
        if not folder.exists():
            return None
        try:
            template = _read(folder)
            check(template, folder)
        except (ImageError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("template %s: thrown away: %s", template_id, error)
            self.remove(template_id)
            return None
        with suppress(OSError):
            os.utime(folder)
        return template

    def all(self) -> list[Kept]:
        """What is here, the most recently used first; what cannot be read is left out."""
        found = []
        for folder in self._folders():
            with suppress(OSError, ValueError, KeyError, TypeError):
                found.append(Kept(_read(folder), folder.stat().st_mtime, _mib(folder)))
        return sorted(found, key=lambda kept: -kept.used)

    def remove(self, template_id: str) -> None:
        """Throw one away; idempotent. Raises OSError."""
        if not _ID.match(template_id):
            raise ImageError(f"template {template_id!r}: want an id as wnodes template list shows it")
        folder = self.root / template_id
        aside = self.root / f".gone-{template_id}-{os.urandom(4).hex()}"
        with suppress(FileNotFoundError):
            os.rename(folder, aside)  # nobody finds it half there
        remove_tree(aside)

    def purge(self, keep: str = "") -> list[str]:
        """Throw away what has no image any more, then the least recently used beyond the bounds; their ids."""
        kept = self.all()
        gone = [each for each in kept if not all(os.path.exists(p) for p in _needs(each.template))]
        rest = [each for each in kept if each not in gone]
        room = 0
        for number, each in enumerate(rest, 1):
            room += each.mib
            if each.template.id != keep and (number > self._max_templates or room > self._max_mib):
                gone.append(each)
        for each in gone:
            self.remove(each.template.id)
        return [each.template.id for each in gone]

    @contextmanager
    def building(self, template_id: str, *, wait: bool = True) -> Iterator[bool]:
        """Be the only one who builds this; without ``wait`` False if another does."""
        from wnodes_core.images.layout import locked, try_lock

        path = self.root / f".lock-{template_id}"
        if wait:
            with locked(path, deadline=time.monotonic() + 3600):
                yield True
            return
        fd = try_lock(path)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def note_failure(self, template_id: str, error: WnodesError) -> None:
        """Leave word of a build that failed for those who waited for it."""
        text = json.dumps({**error.to_dict(), "at": time.time()}).encode()
        write_atomic(self.root / f".failed-{template_id}", text, mode=0o600)

    def failure(self, template_id: str, since: float) -> WnodesError | None:
        """Why the last build failed, if that was after ``since``: who waited meanwhile need not try the same again."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads((self.root / f".failed-{template_id}").read_bytes())
            if told["at"] > since:
                return from_dict(told)
        return None

    def put(self, made: Mapping[str, Any], source: Path) -> Template:
        """Take what a builder left in ``source`` and put it on the shelf.

        The builder may run as another account, which keeps no hand on it: files are copied, none is
        followed, and what is shelved is ours alone to write.

        Raises ImageError for what is no template, StateDirFull.
        """
        template_id = str(made.get("id"))
        if not _ID.match(template_id):
            raise ImageError(f"the builder left no template: id {template_id[:80]!r}")
        final = self.root / template_id
        aside = self.root / f".gone-{template_id}-{os.urandom(4).hex()}"
        with full_disk_is_host_error(self.root):
            aside.mkdir(mode=0o755)
            try:
                template = _moved_in(made, source, aside, final)
                seen = {name: _seen(aside / name) for name in _names(template)}
                text = json.dumps({"template": asdict(template), "files": seen})
                write_atomic(aside / MANIFEST, text.encode())
                if not all(_is_for_all(path) for path in _needs(template)):
                    os.chmod(aside, 0o700)  # who may not read the image may not read what was made of it
                sync_folder(aside)
                self.remove(template.id)
                os.rename(aside, final)
                sync_folder(self.root)
            except BaseException:
                remove_tree(aside)
                raise
        return template

    def leftovers(self) -> list[Path]:
        """Folders of builders, and of removals that were cut short."""
        with suppress(FileNotFoundError):
            return [path for path in self.root.iterdir() if path.name.startswith(("building-", ".gone-"))]
        return []

    def _folders(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return [path for path in self.root.iterdir() if _ID.match(path.name)]
        return []


def check(template: Template, folder: Path) -> None:
    """Compare a template's files with what they were when they were shelved.

    Size and times of each (nothing writes to a file without its times telling), the content of small ones.

    Raises ImageError for what was altered or cut, FileNotFoundError for what is gone.
    """
    wanted = json.loads((folder / MANIFEST).read_bytes())["files"]
    for name in _names(template):
        if _seen(folder / name) != wanted.get(name):
            raise ImageError(f"template {template.id}: {name} is not what was saved", hint="it is built anew")
    for path in _needs(template):
        os.stat(path)


def _read(folder: Path) -> Template:
    data = json.loads((folder / MANIFEST).read_bytes())
    template = Template.from_dict(data["template"])
    if template.id != folder.name or template.folder != str(folder):
        raise ImageError(f"template {folder.name}: it says to be {template.id} in {template.folder}")
    return template


def _names(template: Template) -> list[str]:
    """The template's own files, by their names in its folder."""
    own = [path for path in (template.memory, *(disk.path for disk in template.disks)) if path]
    return sorted({Path(path).name for path in own} | set(template.files.values()))


def _needs(template: Template) -> list[str]:
    """Files of the image that a clone opens too."""
    return [disk.base for disk in template.disks if disk.base]


def _is_for_all(path: str) -> bool:
    with suppress(FileNotFoundError):
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    return False


def _seen(path: Path) -> list[Any]:
    found = os.lstat(path)
    content = hashlib.sha256(path.read_bytes()).hexdigest() if found.st_size <= _READ_WHOLE else ""
    return [found.st_size, found.st_mtime_ns, found.st_ino, content]


def _moved_in(made: Mapping[str, Any], source: Path, aside: Path, final: Path) -> Template:
    try:
        template = Template.from_dict(made)
        memory = str(final / Path(template.memory).name) if template.memory else ""
        disks = tuple(replace(disk, path=str(final / Path(disk.path).name)) for disk in template.disks)
        template = replace(template, folder=str(final), memory=memory, disks=disks)
        names = _names(template)
        if any("/" in name or name.startswith(".") or name == MANIFEST for name in names):
            raise ValueError(f"files {names}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ImageError(f"the builder left no template: {error}") from None
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in names:
            _copy(name, folder, aside / name)
    finally:
        os.close(folder)
    return template


def _copy(name: str, folder: int, target: Path) -> None:
    """Copy a regular file with its holes; pages of zeros become holes too."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(fd, "rb", buffering=0) as source, open(target, "xb", buffering=0) as copy:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"the builder left {name} as something else than a file")
        size = os.fstat(fd).st_size
        os.ftruncate(copy.fileno(), size)
        for start, end in extents(fd, size):
            source.seek(start)
            copy.seek(start)
            _copy_range(source, copy, end - start)
        # A user's own shelf is nobody else's, and QEMU 7.2 wants to be able to write to the memory it maps privately.
        os.fchmod(copy.fileno(), 0o444 if os.geteuid() == 0 else 0o600)
        os.fsync(copy.fileno())


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: (start, end) of each piece."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def _copy_range(source: Any, copy: Any, left: int) -> None:
    while left > 0:
        data = source.read(min(_CHUNK, left))
        if not data:
            raise ImageError("a file of the builder's shrank while it was copied")
        if data.count(0) == len(data):
            copy.seek(len(data), os.SEEK_CUR)
        else:
            copy.write(data)
        left -= len(data)


def _mib(folder: Path) -> int:
    return sum(path.lstat().st_blocks for path in folder.iterdir()) * 512 >> 20
