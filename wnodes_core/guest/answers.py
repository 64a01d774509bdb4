"""What goes over the guest channel as JSON, and what a command of root's there answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wnodes_core.guest import frames

MAX_OUTPUT = 256 << 10


@dataclass(frozen=True)
class Done:
    """A finished root command: exit code (128 + signal if it was killed) and its output."""

    code: int
    stdout: bytes
    stderr: bytes


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON that the guest's own reader takes; lone surrogates (PEP 383) stay escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def decode(payload: bytes) -> dict[str, Any]:
    """JSON of the guest. Raises ProtocolError, whatever it is."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise frames.ProtocolError(f"bad JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise frames.ProtocolError(f"JSON {type(value).__name__}: want an object")
    return value


class Collector:
    """Takes the frames of one command; ``send`` grants it more credit."""

    def __init__(self, send: Callable[..., None], ending: asyncio.Future[dict[str, Any]]) -> None:
        self._send = send
        self.ending = ending
        self.output = {1: bytearray(), 2: bytearray()}

    def take(self, kind: int, sub: int, stream: int, payload: bytes) -> None:
        """One frame. Raises ProtocolError."""
        if kind == frames.DATA and sub:
            self.output[sub] += payload[: max(0, MAX_OUTPUT - len(self.output[sub]))]
            self._send(frames.CREDIT, sub, stream, frames.U32.pack(max(1, len(payload))))
        elif kind == frames.EXIT and not self.ending.done():
            self.ending.set_result(decode(payload))
