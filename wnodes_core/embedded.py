"""The embedded default: one user, one machine, no LRMS, no wnodesd, no root.

The same plan, keeper and lifecycle as under a batch system; the lease folder lies in
``/var/tmp/wnodes-UID`` (local disk, short enough for socket names), and the lease lasts as long
as its launcher. What a crash left behind is undone by the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from wnodes_core import processes
from wnodes_core.errors import WnodesError
from wnodes_core.files import private_folder, remove_tree, write_atomic
from wnodes_core.journal import Journal
from wnodes_core.model import Job, Process
from wnodes_core.plugins import Plugins
from wnodes_core.undoing import undo_one

STARTER = "starter.json"  # who made the folder; it counts until there is a lease.json
STARTING_S = 60
PREFIX = "local-"  # of leases; the user's templates lie beside them


def leases_root() -> Path:
    """This user's folder of leases, made if need be. Raises HostError if it is not ours alone."""
    return private_folder(f"/var/tmp/wnodes-{os.getuid()}")


def new_lease() -> tuple[str, str]:
    """A fresh lease of this process's: its id and its private folder."""
    lease = f"{PREFIX}{os.urandom(4).hex()}"
    folder = private_folder(leases_root() / lease)
    me = processes.read(os.getpid())
    starter = {"keeper": {"pid": os.getpid(), "started": me.started if me else 0}}
    try:
        write_atomic(folder / STARTER, json.dumps(starter).encode(), mode=0o600)
    except BaseException:
        remove_tree(folder)
        raise
    return lease, str(folder)


def own_job(lease: str, *, work_dir: str) -> Job:
    """The job that a bare ``wnodes run`` is: the calling user, here and now."""
    import pwd

    uid = os.getuid()
    return Job(
        lrms="local",
        job_id=lease.rpartition("-")[2],
        node=socket.gethostname().partition(".")[0],
        uid=uid,
        gid=os.getgid(),
        user=pwd.getpwuid(uid).pw_name,
        work_dir=work_dir,
    )


def sweep() -> list[Exception]:
    """Undo what dead keepers left behind; leases whose keeper lives are not touched.

    A folder that names nobody has just been made; it counts as dead when it is older than a minute.
    """
    errors: list[Exception] = []
    for folder in leases_root().iterdir():
        if folder.name.startswith(PREFIX) and not _alive(folder):
            errors += undo(folder)
    return errors


def undo(folder: Path) -> list[Exception]:
    """Undo one dead lease by its journal and remove its folder; idempotent."""
    errors: list[Exception] = []
    if (folder / "journal").exists():
        hook = Plugins().hook  # a stranger's plug-in may have made what is to be undone
        journal = Journal(folder / "journal")
        errors = journal.undo(lambda resource: undo_one(resource, hook))
        journal.close()
    if not errors:
        try:
            remove_tree(folder)
        except OSError as error:
            errors.append(error)
    return errors


def _alive(folder: Path) -> bool:
    """Whether the lease's keeper lives, or the launcher that is about to start it (its image may take long)."""
    try:
        for name in ("lease.json", STARTER):
            with contextlib.suppress(FileNotFoundError):
                return _lives(json.loads((folder / name).read_text()))
        return time.time() - folder.stat().st_mtime < STARTING_S
    except FileNotFoundError:
        return True  # its own keeper has just removed it
    except (ValueError, KeyError, TypeError, OSError):
        return False


def _lives(facts: dict[str, Any]) -> bool:
    keeper = facts["keeper"]
    return processes.alive(Process(int(keeper["pid"]), 0, os.getuid(), int(keeper["started"]), "", ()))


def wait_for_keeper(pid: int, folder: str) -> list[Exception]:
    """Wait until the keeper has cleaned up; do it ourselves if it was killed."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return undo(Path(folder)) if os.path.isdir(folder) else []


def warn(errors: list[Exception]) -> None:
    """Tell the user what could not be removed."""
    import sys

    for error in errors:
        text = error.message if isinstance(error, WnodesError) else error
        print(f"wnodes: warning: left behind: {text}", file=sys.stderr)
