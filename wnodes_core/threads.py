"""Work in a thread that nobody leaves half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


async def to_its_end(work: Callable[[], Made]) -> Made:
    """Run ``work`` in a thread; a cancelled caller still waits for it.

    A VM, or a gateway, whose start nobody awaits any more would come up behind the back of the undo.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait({thread})
        raise
