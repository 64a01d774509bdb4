"""All leases that the caller may see: wnodesd's, and those of the caller's own embedded runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from wnodes_core import settings
from wnodes_core.agent import client
from wnodes_core.cli.output import clean
from wnodes_core.errors import RequestError, TransientError
from wnodes_core.files import read_tail

_MAX_STATE_BYTES = 1 << 20
_TIMEOUT_S = 10.0
# What every lease has, whoever told of it; also the keys that --json always prints.
KEYS = ("id", "lrms", "job_id", "node", "user", "uid", "image", "state", "since", "folder", "trace", "origin")

Lease = dict[str, Any]


def daemon_socket() -> str:
    """Where this node's wnodesd listens, after the settings."""
    return settings.load().daemon.socket


def all_leases(*, ended: bool = False) -> list[Lease]:
    """wnodesd's leases and the embedded ones, oldest first; with ``ended``, those that are over too.

    A daemon that is not there is no error (an embedded user has none); one that does not answer
    is warned of on stderr.
    """
    found = [_normal(lease, "embedded") for lease in embedded_states(f"/var/tmp/wnodes-{os.getuid()}")]
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


def _normal(lease: dict[str, Any], origin: str) -> Lease:
    empty: Lease = {key: "" for key in KEYS} | {"uid": -1, "since": 0.0, "trace": []}
    return {**empty, **lease, "origin": origin}


def one_lease(word: str) -> Lease:
    """The lease with this id, this beginning of an id, or this job id.

    Raises RequestError if there is none, or more than one.
    """
    found = all_leases(ended=True)
    living = [lease for lease in found if lease["state"] != "ended"]
    for matches in (
        [lease for lease in found if lease["id"] == word],
        [lease for lease in living if word == lease["job_id"]],
        [lease for lease in living if lease["id"].startswith(word)],
        [lease for lease in found if word == lease["job_id"]][-1:],  # a job id may have come back
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(lease["id"] for lease in matches)
            raise RequestError(f"lease {word!r}: more than one answers to that: {ids}", hint="name one by its id")
    raise RequestError(f"lease {word!r}: no such lease of yours on this node", hint="see wnodes lease list")
