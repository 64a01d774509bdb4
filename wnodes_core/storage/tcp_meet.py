"""How the two ends of a mount over TCP find each other among strangers: whoever is no part of it is hung up on.

Stands alone and is Python 3.6, for it runs on both sides: the host imports it, the guest gets its text. Each end
holds two secrets that came by the guest channel: the caller says the first, and hears the second only if that
was right. So nobody else of the node can have the caller's place, and nobody the place of an end that died.
"""
# ruff: noqa: UP031 - guest code, Python 3.6

from __future__ import annotations

import os
import select
import socket
import sys
import time

SECRET_BYTES = 32
_MOST = 64  # strangers that may be connected and silent at a time: beyond them the oldest goes
_PAUSE_S = 0.05


def listen(address: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free. Raises OSError."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_MOST)
    except BaseException:
        listener.close()
        raise
    return listener


def wait_for(listener: socket.socket, first: bytes, second: bytes, timeout_s: float) -> socket.socket:
    """The connection of the caller that knows ``first``, which has been told ``second``. Raises OSError."""
    end = time.monotonic() + timeout_s
    callers = {}  # type: dict[socket.socket, bytes]
    listener.setblocking(False)
    try:
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise OSError(110, "nobody who is expected has called")
            found = _turn(listener, callers, first, left)
            if found is not None:
                return _answered(found, second)
    finally:
        for stranger in callers:
            stranger.close()


def _turn(
    listener: socket.socket, callers: dict[socket.socket, bytes], first: bytes, left_s: float
) -> socket.socket | None:
    for ready in select.select([listener] + list(callers), [], [], left_s)[0]:
        if ready is listener:
            _take(listener, callers)
        elif ready in callers and _knows(ready, callers, first):
            return ready
    return None


def _take(listener: socket.socket, callers: dict[socket.socket, bytes]) -> None:
    try:
        caller = listener.accept()[0]
    except OSError:
        return  # it has gone again
    caller.setblocking(False)
    callers[caller] = b""
    if len(callers) > _MOST:
        oldest = next(iter(callers))
        del callers[oldest]
        oldest.close()


def _knows(caller: socket.socket, callers: dict[socket.socket, bytes], first: bytes) -> bool:
    """Whether a caller has now said the secret; then it is no more among them, nor if it said something else."""
    try:
        said = caller.recv(len(first) - len(callers[caller]))
    except BlockingIOError:
        return False
    except OSError:
        said = b""
    callers[caller] += said
    # Judged when it is whole and never before: who is told after each byte guesses them one by one.
    if said and len(callers[caller]) < len(first):
        return False
    known = callers.pop(caller) == first
    if not known:
        caller.close()
    return known


def _answered(caller: socket.socket, second: bytes) -> socket.socket:
    caller.setblocking(True)
    caller.sendall(second)
    return caller


def call(address: str, port: int, first: bytes, second: bytes, timeout_s: float) -> socket.socket:
    """A connection to the listener that knows ``second``, tried until it is there. Raises OSError."""
    end = time.monotonic() + timeout_s
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise OSError(110, "%s:%d does not answer" % (address, port))
        try:
            return _called(address, port, first, second, left)
        except PermissionError:
            raise
        except OSError:
            time.sleep(_PAUSE_S)


def _called(address: str, port: int, first: bytes, second: bytes, left_s: float) -> socket.socket:
    peer = socket.create_connection((address, port), min(left_s, 5))
    try:
        peer.settimeout(left_s)
        peer.sendall(first)
        said = b""
        while len(said) < len(second):
            more = peer.recv(len(second) - len(said))
            if not more:
                raise OSError(104, "hung up")
            said += more
        if said != second:
            raise PermissionError(13, "%s:%d is somebody else" % (address, port))
        peer.settimeout(None)
    except BaseException:
        peer.close()
        raise
    return peer


def as_stdio(peer: socket.socket) -> None:
    """Make a connection stdin and stdout, for the program that is to come; what it sends is sent at once."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for fd in (0, 1):
        os.dup2(peer.fileno(), fd)


def main(words: list[str]) -> None:
    """``call|wait ADDRESS PORT FIRST SECOND SECONDS PROGRAM [ARGUMENT…]``: meet, then become the program."""
    how, address, port, first, second, seconds = words[:6]
    secrets = bytes.fromhex(first), bytes.fromhex(second)
    if how == "call":
        peer = call(address, int(port), secrets[0], secrets[1], float(seconds))
    else:
        peer = wait_for(listen(address, int(port)), secrets[0], secrets[1], float(seconds))
    as_stdio(peer)
    os.execvp(words[6], words[6:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit("mount over TCP: %s" % error.strerror)
