"""A gateway of a second account: becomes sftp-server once wnodesd has written down that it is there.

wnodesd runs ``python -I -m wnodes_core.agent.serve_as PORT MOUNT`` **as the account**: PORT is the number of an open
socket, MOUNT a JSON object. Whatever is the account's to judge is judged here, with its rights and no more: the
source is opened here, never by root. It says on stdout that it is ready, or why not, and serves only after a byte on
stdin; at the end of stdin it ends, so that a wnodesd that dies in between leaves nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

from wnodes_core.errors import HostError, WnodesError
from wnodes_core.model import Mount
from wnodes_core.pool.become import become
from wnodes_core.storage import confine, sshfs

_OPEN_FILES = 4096  # its guest may hold so many open; the rest of the node's are not its to take


def main() -> int:
    """Entry point; returns only if it does not serve."""
    port, mount = int(sys.argv[1]), Mount(**json.loads(sys.argv[2]))
    try:
        if os.getuid() == 0 or os.getgid() == 0:
            raise HostError("a gateway of root's: want an account")
        become(os.getuid(), os.getgid(), os.getgroups())
        sshfs.check_source(mount)
        if problem := confine.usable():
            raise HostError(f"mount {mount}: a second account's gateway must be confined to its folder: {problem}")
        restrict = confine.restriction(confine.make_ruleset(sshfs.rules_of(mount)))
        argv = sshfs.server_argv(mount)
    except (WnodesError, OSError) as error:
        told = error if isinstance(error, WnodesError) else HostError(f"mount {mount}: {error}")
        _say({"ok": False, "error": told.to_dict()})
        return 1
    _say({"ok": True})
    if os.read(0, 1) != b"+":
        return 1
    for kind, most in ((resource.RLIMIT_NOFILE, _OPEN_FILES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(kind, (most, most))
    for sub in (0, 1):
        os.dup2(port, sub)
    os.close(port)
    restrict()
    return os.execve(argv[0], argv, {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})


def _say(what: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(dict(what)).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
