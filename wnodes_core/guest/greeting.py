"""The host's talk with the bootstrap, before the agent runs: it asks for the agent and is sent it."""

from __future__ import annotations

import os
import re
import zlib

from wnodes_core.guest import bundle, frames

_GREETING = re.compile(rb"WNODES-BOOT 1 (\d{1,9})\n")
_MAX_TALK = 64 << 10  # a guest's other chatter on the port
_MAX_UNREAD = 4 << 20  # some agents: 16 bytes of a guest's ask for 80 KiB of ours


class Greeting:
    """What was said so far on one port."""

    def __init__(self) -> None:
        self._nonce = os.urandom(8).hex().encode()
        self._talk = b""
        self._answered = -1

    def heard(self, data: bytes, unsent: int) -> tuple[bytes, bytes | None]:
        """What to send for what has come; and, once the agent itself speaks, what followed its first word.

        Raises ProtocolError if it asks and asks while ``unsent`` bytes wait for it.
        """
        self._talk += data
        answer = b""
        for match in _GREETING.finditer(self._talk):
            if int(match[1]) != self._answered:
                if unsent + len(answer) > _MAX_UNREAD:
                    raise frames.ProtocolError("it asks for the agent again and again and does not take it")
                self._answered = int(match[1])
                source = bundle.agent_source()
                answer += b"WNODES-PUSH %s %d %d\n" % (self._nonce, len(source), zlib.crc32(source)) + source
        mark = b"WNODES-AGENT " + self._nonce + b"\n"
        before, found, rest = self._talk.partition(mark)
        # Greetings are answered once, so they must not be seen again; a torn one must be kept.
        self._talk = before[before.rfind(b"\n") + 1 :][-_MAX_TALK:]
        return answer, rest if found else None
