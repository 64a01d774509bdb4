"""Having a template built: one builder at a time for each, under its own account, and nothing left of it."""

from __future__ import annotations

import json
import logging
import os
import pwd
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnodes_core import command
from wnodes_core.agent.ending import remove_folder
from wnodes_core.errors import CommandError, ImageError, SettingsError, TransientError, WnodesError, from_dict
from wnodes_core.files import private_folder
from wnodes_core.model import Job, Template
from wnodes_core.plan import Plan, User
from wnodes_core.templates.shelf import MADE, Shelf
from wnodes_core.templates.wanted import ID_LENGTH, MOUNT_PORTS, Wanted

log = logging.getLogger(__name__)

UNDO_S = 60.0
_MAX_MADE = 1 << 20
_TELL_S = 5.0
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Account:
    """Who boots the guest that is saved. As root never root itself."""

    uid: int
    gid: int

    @classmethod
    def of(cls, name: str) -> Account:
        """The account of that name for root; for anybody else themselves. Raises SettingsError."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise SettingsError(f"warm.build_user {name!r}: no such account on this node") from None
        if entry.pw_uid == 0:
            raise SettingsError(f"warm.build_user {name!r}: want an account without rights, as nobody")
        return cls(entry.pw_uid, entry.pw_gid)

    @property
    def become(self) -> tuple[int, int, Sequence[int]] | None:
        """For ``command.run``: its own groups too, for the access to KVM."""
        if os.geteuid() == self.uid:
            return None
        return self.uid, self.gid, os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid)


@dataclass(frozen=True)
class Builder:
    """Builds templates onto a shelf."""

    shelf: Shelf
    account: Account
    ways: tuple[str, ...]
    timeout_s: float
    disabled: tuple[str, ...] = ()

    def build(self, wanted: Wanted, tell: Tell = lambda text: None) -> Template:
        """The template, from the shelf or made now; many callers at once get the same one.

        Raises WnodesError for a guest that does not boot, rest or save here; nothing of it is left.
        """
        self.shelf.make()
        began = time.time()
        with _telling(f"building a template of {wanted.image.name}", tell), self.shelf.building(wanted.id):
            found = self.shelf.find(wanted.id)
            if found is not None:
                return found
            failure = self.shelf.failure(wanted.id, began)
            if failure:
                raise failure
            try:
                template = self._built(wanted)
            except WnodesError as error:
                self.shelf.note_failure(wanted.id, error)
                raise
            self.shelf.purge(keep=wanted.id)
            return template

    def _built(self, wanted: Wanted) -> Template:
        folder = self._folder(wanted)
        try:
            self._run(wanted, folder)
            made = _made(folder)
            self._check(made, wanted)
            return self.shelf.put(made, folder)
        finally:
            self._clean(folder)

    def sweep(self) -> None:
        """Undo what killed builders left, and throw away what can serve nobody any more."""
        for path in self.shelf.leftovers():
            template_id = path.name.removeprefix("building-").removeprefix(".gone-")[:ID_LENGTH]
            with self.shelf.building(template_id, wait=False) as alone:
                if alone:
                    self._clean(path)
        self.shelf.purge()

    def _check(self, made: dict[str, Any], wanted: Wanted) -> None:
        """A guest that broke out of its builder may not pass for another's template."""
        want = {"id": wanted.id, "image": wanted.image.digest, "accel": wanted.accel}
        shape, disks = made.get("shape"), made.get("disks")
        base = disks[0].get("base") if isinstance(disks, list) and disks and isinstance(disks[0], dict) else None
        sizes = (shape.get("cpus"), shape.get("memory_mib")) if isinstance(shape, dict) else None
        is_it = all(made.get(name) == value for name, value in want.items()) and made.get("way") in self.ways
        if not is_it or base != wanted.image.path or sizes != (wanted.cpus, wanted.base_mib):
            raise ImageError(f"the builder left another template than {wanted.id}")

    def _folder(self, wanted: Wanted) -> Path:
        name = f"building-{wanted.id}-{os.urandom(2).hex()}"
        return private_folder(self.shelf.root / name, uid=self.account.uid, gid=self.account.gid)

    def _run(self, wanted: Wanted, folder: Path) -> None:
        plan = self._plan(wanted, folder).to_dict()
        given = {"plan": plan, "id": wanted.id, "ways": self.ways, "disabled": self.disabled}
        # Niced: what is built here serves the next job, and may not cost a running one its processor.
        argv = ["nice", "-n", "10", sys.executable, "-I", "-m", "wnodes_core.templates.build"]
        try:
            command.run(
                argv, timeout_s=self.timeout_s, stdin=json.dumps(given).encode(), become=self.account.become
            )
        except CommandError as error:
            raise _told(error, wanted) from error

    def _plan(self, wanted: Wanted, folder: Path) -> Plan:
        user = User.of(self.account.uid, self.account.gid)
        node = socket.gethostname().partition(".")[0]
        return Plan(
            lease=folder.name,
            folder=str(folder),
            job=Job("template", wanted.id, node, user.uid, user.gid, user.name),
            image=wanted.image,
            user=user,
            accel=wanted.accel,
            cpus=wanted.cpus,
            memory_mib=wanted.base_mib,
            mounts=(),
            boot_timeout_s=self.timeout_s,
            mount_ports=MOUNT_PORTS,
            most_mib=wanted.most_mib,
        )

    def _clean(self, folder: Path) -> None:
        """Undo by the builder's own journal, with the builder's own rights; then the folder goes."""
        if folder.name.startswith("building-") and os.path.lexists(folder / "journal"):
            argv = [sys.executable, "-I", "-m", "wnodes_core.agent.undo", str(folder)]
            command.run(argv, timeout_s=UNDO_S, become=self.account.become)
        remove_folder(str(folder))


def _made(folder: Path) -> dict[str, Any]:
    fd = os.open(folder / MADE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{folder / MADE}: want a file")
        text = file.read(_MAX_MADE)
    try:
        made = json.loads(text)
    except ValueError:
        made = None
    if not isinstance(made, dict):
        raise ImageError(f"{folder / MADE}: {text[:60]!r}: want a JSON object")
    return made


def _told(error: CommandError, wanted: Wanted) -> WnodesError:
    """The builder's own error, if it could still say it."""
    lines = error.stderr_tail.strip().splitlines()
    with suppress(ValueError, KeyError, IndexError, TypeError):
        told: WnodesError = from_dict(json.loads(lines[-1]))
        return type(told)(f"template of {wanted.image.name}: {told.message}", hint=told.hint)
    log.info("template of %s: %s", wanted.image.name, error)  # with the whole traceback
    why = lines[-1] if lines else str(error)
    return TransientError(f"template of {wanted.image.name}: its builder failed: {why[:500]}", hint="wnodes doctor")


class _telling:
    """Say ``what`` and for how long, now and then, for as long as the block runs."""

    def __init__(self, what: str, tell: Tell) -> None:
        self._what, self._tell = what, tell
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        seconds = 0
        while not self._done.wait(_TELL_S):
            seconds += int(_TELL_S)
            self._tell(f"{self._what}: {seconds} s")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
