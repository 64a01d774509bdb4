"""The gateway of a mount over TCP, as the job's user: meets its guest, then becomes the confined sftp-server.

Told on stdin, so that its secrets are in no argv: ``{"how": "call" or "wait", "address", "port", "secrets",
"seconds", "listener": fd, "argv", "rules": [[path, rights]] or None}``. Its pid stays the same throughout.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from wnodes_core.storage import confine, tcp_meet


def meet(told: dict[str, Any]) -> socket.socket:
    """The connection to the guest. Raises OSError."""
    first, second = (bytes.fromhex(each) for each in told["secrets"])
    if told["how"] == "call":
        return tcp_meet.call(told["address"], told["port"], first, second, told["seconds"])
    with socket.socket(fileno=told["listener"]) as listener:
        return tcp_meet.wait_for(listener, first, second, told["seconds"])


def main() -> None:
    """Raises OSError: then nothing is served."""
    told = json.loads(sys.stdin.buffer.read())
    tcp_meet.as_stdio(meet(told))
    if told["rules"] is not None:
        confine.restriction(confine.make_ruleset(told["rules"]))()
    os.execv(told["argv"][0], told["argv"])


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"mount over TCP: {error}")
