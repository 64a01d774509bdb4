"""All leases that the caller may see: wnodesd's, and those of the caller's own embedded runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from wnodes_core import history, settings
from wnodes_core.agent import client
from wnodes_core.cli.output import clean
from wnodes_core.errors import RequestError, TransientError
from wnodes_core.files import read_tail

_MAX_STATE_BYTES = 1 << 20
_TIMEOUT_S = 10.0
_NAMED = 8  # leases that an error names
# What every lease has, whoever told of it; also the keys that --json always prints.
KEYS = ("id", "lrms", "job_id", "node", "user", "uid", "image", "state", "since", "folder", "trace", "start", "origin")

Lease = dict[str, Any]


def daemon_socket() -> str:
    """Where this node's wnodesd listens, after the settings."""
    return settings.load().daemon.socket


def all_leases(*, ended: bool = False) -> list[Lease]:
    """wnodesd's leases and the embedded ones, oldest first; with ``ended``, those that are over too.

    A daemon that is not there is no error (an embedded user has none); one that does not answer
    is warned of on stderr.
    """
    own = f"/var/tmp/wnodes-{os.getuid()}"
    states = {lease["id"]: lease for lease in (embedded_ended(own) if ended else []) + embedded_states(own)}
    found = [_normal(lease, "embedded") for lease in states.values()]
    path = daemon_socket()
    if os.path.exists(path):
        try:
            reply = client.call({"op": "leases", "ended": ended}, path=path, timeout_s=_TIMEOUT_S)
            found += [_normal(lease, "wnodesd") for lease in reply.get("leases", [])]
        except TransientError as error:
            print(f"wnodes: warning: {clean(error.message)}", file=sys.stderr)
    return sorted(found, key=lambda lease: lease["since"])


def embedded_states(root: str) -> list[dict[str, Any]]:
    """``lease.json`` of every lease folder below ``root``, if ``root`` is the caller's own."""
    try:
        if os.lstat(root).st_uid != os.getuid():
            return []
        names = sorted(os.listdir(root))
    except OSError:
        return []
    found = []
    for name in names:
        try:
            state = json.loads(read_tail(Path(root, name, "lease.json"), _MAX_STATE_BYTES))
        except ValueError:
            continue
        if isinstance(state, dict):
            found.append({**state, "id": name, "folder": str(Path(root, name))})
    return found


def embedded_ended(root: str) -> list[dict[str, Any]]:
    """What the caller's embedded runs were, if ``root`` is the caller's own."""
    try:
        own = os.lstat(root).st_uid == os.getuid()
    except OSError:
        return []
    return list(history.read(Path(root, history.OF_USER))) if own else []


def _normal(lease: dict[str, Any], origin: str) -> Lease:
    empty: Lease = {key: "" for key in KEYS} | {"uid": -1, "since": 0.0, "trace": [], "start": None}
    return {**empty, **lease, "origin": origin}


def one_lease(word: str) -> Lease:
    """The lease with this id, this beginning of an id, or this job id; '' is the only one, or the last that ended.

    Raises RequestError if there is none, or more than one.
    """
    found = all_leases(ended=True)
    living = [lease for lease in found if lease["state"] != "ended"]
    for matches in (
        [] if word else living or found[-1:],
        [lease for lease in found if lease["id"] == word],
        [lease for lease in living if word == lease["job_id"]],
        [lease for lease in living if word and lease["id"].startswith(word)],
        [lease for lease in found if word == lease["job_id"]][-1:],  # a job id may have come back
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(lease["id"] for lease in matches)
            which = f"lease {word!r}: more than one answers to that" if word else "which lease? more than one is here"
            raise RequestError(f"{which}: {ids}", hint="name one by its id")
    ids = ", ".join(clean(lease["id"]) for lease in found[-_NAMED:])
    there = f"the last on this node: {ids}" if found else "there is none on this node, and none has ended"
    which = f"lease {word!r}: no such lease of yours" if word else "no lease of yours"
    raise RequestError(f"{which}; {there}", hint="see wnodes lease list --ended")
