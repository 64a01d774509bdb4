"""Guests that know nothing of us: cloud-init or QEMU's guest agent starts our bootstrap there.

cloud-init: a seed disk with the label ``cidata`` (its NoCloud source). qemu-ga: its own port,
asked until it answers. Which of them an image has is its fact ``agent``; ``builtin`` needs neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from wnodes_core.command import run
from wnodes_core.errors import CommandError, HostError, ImageError
from wnodes_core.guest import start

QGA_PORT = "org.qemu.guest_agent.0"
KINDS = ("builtin", "cloud-init", "qemu-ga")
ISO_MAKERS = ("xorrisofs", "genisoimage", "mkisofs")  # one language of options
_ASK_EVERY_S = 0.25
_MAX_LINE = 1 << 20


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


async def ask_guest_agent(path: str) -> None:
    """Have QEMU's guest agent start our bootstrap, as soon as it answers; returns when it has.

    Never gives up by itself: the caller has the deadline. A guest-exec that the image forbids
    raises ImageError.
    """
    while True:
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE)
            try:
                await _converse(reader, writer)
            finally:
                writer.close()
            return
        await asyncio.sleep(_ASK_EVERY_S)


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    number = 0
    while True:
        # Answers to earlier questions may still lie in the port (guest-sync in QEMU's QGA reference).
        number += 1
        answer = await _ask(reader, writer, {"execute": "guest-sync", "arguments": {"id": number}})
        if answer is not None and answer.get("return") == number:
            break
    for command in start.guest_agent_commands():
        answer = await _ask(reader, writer, command, timeout_s=30)
        if answer is None or "return" not in answer:
            said = (answer or {}).get("error", {})
            raise ImageError(
                f"the image's guest agent refuses guest-exec: {str(said.get('desc', 'no answer'))[:200]}",
                hint="allow guest-exec in the image, or give it cloud-init or our bootstrap (docs/images.md)",
            )


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: dict[str, Any], *, timeout_s: float = 1.0
) -> dict[str, Any] | None:
    writer.write(json.dumps(command).encode() + b"\n")
    try:
        line = await asyncio.wait_for(reader.readline(), timeout_s)
    except TimeoutError:
        return None
    if not line:
        raise OSError("the VM closed the port")
    answer = json.loads(line)
    return answer if isinstance(answer, dict) else None
