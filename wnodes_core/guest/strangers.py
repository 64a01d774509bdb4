"""Guests that know nothing of us: cloud-init or QEMU's guest agent starts our bootstrap there.

cloud-init: a seed disk with the label ``cidata`` (its NoCloud source). qemu-ga: asked through the
backend until it answers. Which of them an image has is its fact ``agent``; ``builtin`` needs neither.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wnodes_core.command import run
from wnodes_core.errors import CommandError, HostError, ImageError
from wnodes_core.guest import start

KINDS = ("builtin", "cloud-init", "qemu-ga")
ISO_MAKERS = ("xorrisofs", "genisoimage", "mkisofs")  # one language of options
_ASK_EVERY_S = 0.05  # without an agent libvirt answers at once, by itself
_PING_S = 2
_EXEC_S = 30


def kind_of(facts: Any) -> str:
    """How the agent gets to run in an image with these facts. Raises ImageError for an unknown way."""
    kind = facts.get("agent", "builtin")
    if kind not in KINDS:
        raise ImageError(f"image fact agent={kind!r}: want one of {', '.join(KINDS)}")
    return str(kind)


def make_seed(folder: str, path: str, instance: str) -> None:
    """Write the seed disk for cloud-init.

    Raises HostError where nothing on this host can make an ISO image.
    """
    source = Path(folder, "seed")
    source.mkdir(mode=0o700, exist_ok=True)
    (source / "user-data").write_text(start.user_data())
    (source / "meta-data").write_text(start.meta_data(instance))
    for program in ISO_MAKERS:
        try:
            run([program, "-quiet", "-V", "cidata", "-J", "-r", "-o", path, os.fspath(source)])
        except CommandError as error:
            if error.exit_code != 127:
                raise
        else:
            return
    raise HostError("no program here makes an ISO image for cloud-init", hint="apt-get install xorriso")


async def ask_guest_agent(ask: Callable[[str, int], str | None]) -> None:
    """Have QEMU's guest agent start our bootstrap, as soon as it answers; returns when it has.

    ``ask(command, timeout_s)`` blocks and returns None while no agent is there. Never gives up by
    itself: the caller has the deadline. Raises ImageError if the image forbids guest-exec.
    """
    while await asyncio.to_thread(ask, json.dumps({"execute": "guest-ping"}), _PING_S) is None:
        await asyncio.sleep(_ASK_EVERY_S)
    for command in start.guest_agent_commands():
        try:
            await asyncio.to_thread(ask, json.dumps(command), _EXEC_S)
        except ImageError as error:
            error.hint = "allow guest-exec in the image, or give it cloud-init or our bootstrap (docs/images.md)"
            raise
