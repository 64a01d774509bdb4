"""The host's end of a clone's port: QEMU connects to us, so that the guest never sees its port hang up."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

from wnodes_core.errors import BootTimeout


async def accept(path: str | os.PathLike[str], timeout_s: float) -> socket.socket:
    """The connection of the QEMU that comes to ``path``; it listens there from the first step of this on.

    The path is free again afterwards. Raises BootTimeout; OSError if nothing can be bound there.
    """
    listener = listen(os.fspath(path))
    try:
        async with asyncio.timeout(timeout_s):
            port, _ = await asyncio.get_running_loop().sock_accept(listener)
    except TimeoutError:
        raise BootTimeout(f"clone: no hypervisor came to its channel within {timeout_s:g} s") from None
    finally:
        listener.close()
        with suppress(FileNotFoundError):
            os.unlink(path)
    return port


def listen(path: str) -> socket.socket:
    """A socket that only our own user can connect to: nobody can before it listens."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
