"""Who a clone is: what it is told at its waking, and the proof that it became that.

A clone is a copy of its template to the last bit. Before it sees anything of a job it is given
entropy, clock, names and keys of its own, and what it then says of itself is compared here.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from wnodes_core.errors import IdentityError

GIVEN = ("machine_id", "boot_id", "host_name")  # what we choose for it; the rest it draws itself
DRAWN = ("ssh_host_keys", "random_seed", "random", "leases")
ENTROPY_BYTES = 64


def ask(host_name: str) -> dict[str, Any]:
    """A fresh identity, as the words of a ``wake`` request; ``clock`` in seconds since the epoch."""
    return {
        "entropy": os.urandom(ENTROPY_BYTES).hex(),
        "clock": time.time(),
        "host_name": host_name,
        "machine_id": uuid.uuid4().hex,
        "boot_id": str(uuid.uuid4()),
    }


def check(template: Mapping[str, Any], asked: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Compare what a woken clone says of itself with what it was asked to be and with its template.

    Raises IdentityError: it may not see a job.
    """
    said = told.get("identity")
    if not isinstance(said, Mapping):
        raise IdentityError(f"clone: it says no identity: {str(told)[:100]}")
    for name in GIVEN:
        if said.get(name) != asked[name]:
            raise IdentityError(f"clone: {name} is {_short(said.get(name))}: want {_short(asked[name])}")
    for name in (*GIVEN, *DRAWN):
        if said.get(name) and said.get(name) == template.get(name):
            raise IdentityError(f"clone: {name} is the template's, {_short(said[name])}")
    if not said.get("random"):
        raise IdentityError("clone: it drew no random number")


def _short(value: object) -> str:
    return repr(value)[:40]
