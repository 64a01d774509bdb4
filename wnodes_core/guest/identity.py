"""Who a clone is: what it is told at its waking, and the proof that it became that.

A clone is a copy of its template to the last bit. Before it sees anything of a job it is given
entropy, clock, names and keys of its own, and what it then says of itself is compared here. A guest
may lie, its kernel is not ours; the proof is against a waking that went wrong unseen.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from wnodes_core.errors import IdentityError

GIVEN = ("machine_id", "boot_id", "host_name")  # what we choose for it; the rest it draws itself
DRAWN = ("ssh_host_keys", "random_seed", "random", "leases", "instance_id")
ENTROPY_BYTES = 64
CLOCK_TOLERANCE_S = 2.0
_LONGEST = 256
_RANDOM = re.compile(r"[0-9a-f]{64}")


def ask(host_name: str) -> dict[str, Any]:
    """A fresh identity, as the words of a ``wake`` request; ``clock`` in seconds since the epoch."""
    return {
        "entropy": os.urandom(ENTROPY_BYTES).hex(),
        "clock": time.time(),
        "host_name": host_name,
        "machine_id": uuid.uuid4().hex,
        "boot_id": str(uuid.uuid4()),
    }


def of(told: Mapping[str, Any]) -> dict[str, str]:
    """The identity that a guest told of itself at ``rest`` or ``wake``: every item, each a short text.

    '' stands for what the guest does not have (no sshd, no seed file).

    Raises IdentityError.
    """
    said = told.get("identity")
    if not isinstance(said, Mapping):
        raise IdentityError(f"clone: it says no identity: {str(told)[:100]}")
    for name in (*GIVEN, *DRAWN):
        value = said.get(name)
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise IdentityError(f"clone: {name} is {_short(value)}: want a text of at most {_LONGEST} letters")
    if not _RANDOM.fullmatch(said["random"]):
        raise IdentityError(f"clone: random is {_short(said['random'])}: want 32 bytes as hex digits")
    return {name: said[name] for name in (*GIVEN, *DRAWN)}


def check(template: Mapping[str, Any], asked: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Compare what a woken clone says of itself with what it was asked to be and with its template.

    To be called as soon as it has answered: its clock has to lie between the asking and now.

    Raises IdentityError: it may not see a job.
    """
    said = of(told)
    for name in GIVEN:
        if said[name] != asked[name]:
            raise IdentityError(f"clone: {name} is {_short(said[name])}: want {_short(asked[name])}")
    for name in said:
        if said[name] and said[name] == template.get(name):
            raise IdentityError(f"clone: {name} is the template's, {_short(said[name])}")
    if said["random"] in asked["entropy"]:
        raise IdentityError("clone: it says our own random numbers")
    for name in ("boot_id", "host_name"):  # as the kernel shows them, where it says so
        if told.get(name, said[name]) != said[name]:
            raise IdentityError(f"clone: its kernel's {name} is {_short(told[name])}: want {_short(said[name])}")
    _check_clock(told.get("clock"), asked["clock"], time.time())


def _check_clock(told: object, asked: float, now: float) -> None:
    # Not more digits than a float has: a guest may answer with an integer of a million.
    if isinstance(told, bool) or not isinstance(told, int | float) or not abs(told) < 2**53:
        raise IdentityError(f"clone: clock is {_short(told)}: want seconds since the epoch")
    if not asked - CLOCK_TOLERANCE_S <= told <= now + CLOCK_TOLERANCE_S:
        early = told - asked if told < asked else told - now
        raise IdentityError(f"clone: its clock is off by {early:+.1f} s: want at most {CLOCK_TOLERANCE_S:g}")


def _short(value: object) -> str:
    return repr(value)[:40]
