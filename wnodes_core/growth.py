"""A clone that is to have more memory than its template: waiting until its guest has taken it in."""

from __future__ import annotations

import asyncio
import time

from wnodes_core.errors import TransientError
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.plan import Plan

TIMEOUT_S = 10.0
_PAUSE_S = 0.02
_ENOUGH = 0.98  # of what was plugged in; the rest is the guest kernel's own tables


async def grown(channel: GuestChannel, plan: Plan) -> None:
    """Return when the guest has the memory of its job: the job's code never sees less.

    Raises TransientError if it does not get there in time, ChannelLost.
    """
    template = plan.template
    more_mib = plan.memory_mib - template.shape.memory_mib if template else 0
    if template is None or more_mib <= 0:
        return
    wanted_kib = int(template.facts["memory_kib"]) + int((more_mib << 10) * _ENOUGH)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        facts = await channel.request("hello")
        found = facts.get("memory_kib")
        if isinstance(found, int) and found >= wanted_kib:
            return
        if time.monotonic() > deadline:
            raise TransientError(f"clone: its guest has {found} KiB of memory: want {wanted_kib}")
        await asyncio.sleep(_PAUSE_S)
