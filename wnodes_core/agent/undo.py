"""Undo what a dead lease's keeper left, with the rights of the job's user.

wnodesd runs ``python -I -m wnodes_core.agent.undo LEASE_FOLDER`` as that user: the user's
journal is never replayed with more rights than its writer had. Exit code 0: nothing is left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from wnodes_core import processes
from wnodes_core.errors import WnodesError
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Process


def undo_folder(folder: str, undo_one: Callable[[Resource], None]) -> list[Exception]:
    """Undo every open resource of ``folder``'s journal; the errors of those that resist."""
    path = os.path.join(folder, "journal")
    if not os.path.lexists(path):
        return []
    journal = Journal(path)
    try:
        return journal.undo(undo_one)
    finally:
        journal.close()


def _undo(resource: Resource) -> None:
    if resource.kind != "process":
        # A keeper that ended well left nothing open: then none of this is loaded.
        from wnodes_core.plugins import Plugins
        from wnodes_core.undoing import undo_one

        return undo_one(resource, Plugins().hook)
    if "pid" in resource.data:
        found = Process(int(resource.data["pid"]), 0, os.getuid(), int(resource.data["started"]), "", ())
        if not processes.kill(found):
            raise WnodesError(f"process {found.pid} survives SIGKILL")
    return None


def main() -> int:
    """Entry point: report what could not be undone on stderr."""
    if len(sys.argv) != 2 or os.lstat(sys.argv[1]).st_uid != os.geteuid():
        print("usage: python -I -m wnodes_core.agent.undo LEASE_FOLDER, as the folder's owner", file=sys.stderr)
        return 2
    errors = undo_folder(sys.argv[1], _undo)
    for error in errors:
        notes = "; ".join(getattr(error, "__notes__", ()))
        print(f"wnodes: undo: {error} ({notes})", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
