"""Frames: what goes over the guest channel and over the keeper's socket. Shared with the guest.

A frame is a header of 12 bytes (type, sub, 0, stream, length; big endian) and its payload. A
stream is one command (or one request); ``sub`` is 0, 1, 2 for stdin, stdout, stderr. DATA flows
only against credit that the receiver has granted for that stream and sub, so one consumer that
stalls stops its own producer and nothing else. Stream ids with the top bit are opened by the guest.
This module also runs in the guest, after ``bundle`` took the annotations out: Python 3.6 grammar.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import struct

DATA, EOF, CREDIT, SHUT = 1, 2, 3, 4  # binary payload: bytes, none, u32, none
OPEN, REPLY, EXIT, CONTROL, NOTE = 5, 6, 7, 8, 9  # JSON payload
KINDS = frozenset(range(1, 10))

HEADER = struct.Struct(">BBHII")
U32 = struct.Struct(">I")
HEAD = HEADER.size
MAX_DATA = 1 << 20
MAX_TO_GUEST = 16 << 20  # a batch script (Slurm allows 4 MiB) in base64 and an environment
MAX_TO_HOST = 1 << 20
WINDOW = 4 << 20  # stdout and stderr, each
STDIN_WINDOW = 1 << 20
MAX_CREDIT = 64 << 20
GUEST_BIT = 1 << 31


class ProtocolError(ValueError):
    """The other side sent what no peer of ours sends."""


def pack(kind: int, sub: int, stream: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(kind, sub, 0, stream, len(payload)) + payload


def credit(sub: int, stream: int, amount: int) -> bytes:
    """A frame that allows ``amount`` further bytes."""
    return pack(CREDIT, sub, stream, U32.pack(amount))


def amount_of(payload: bytes) -> int:
    """The bytes that a CREDIT frame grants. Raises ProtocolError."""
    if len(payload) != 4:
        raise ProtocolError("credit of %d bytes: want 4" % len(payload))
    amount = U32.unpack(payload)[0]
    if not 0 < amount <= MAX_CREDIT:
        raise ProtocolError("credit for %d bytes: want 1 to %d" % (amount, MAX_CREDIT))
    return int(amount)


class Parser:
    """Cuts a byte stream into frames without ever holding more than one bounded frame.

    Read into ``space()``, then iterate ``received(count)``. DATA comes in pieces as it arrives,
    as views into the buffer that hold until the next ``space()``; any other frame comes whole.
    """

    def __init__(self, max_control: int, size: int = 256 << 10) -> None:
        self._max_control = max_control
        self._bytes = bytearray(size)
        self._view = memoryview(self._bytes)
        self._begin = self._end = 0
        self._left = 0  # bytes of the current frame still to come
        self._head = (0, 0, 0)
        self._whole: bytearray | None = None  # a control frame that is being put together

    @property
    def between_frames(self) -> bool:
        """Whether nothing of a frame has come without its rest."""
        return not self._left and self._begin == self._end

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._begin:
            rest = bytes(self._view[self._begin : self._end])  # less than one header
            self._bytes[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        return self._view[self._end :]

    def received(self, count: int):  # type: ignore[no-untyped-def]  # a generator of frames
        """Yield (kind, sub, stream, payload) for what ``count`` more bytes complete.

        Raises ProtocolError.
        """
        self._end += count
        while self._left or self._end - self._begin >= HEAD:
            if not self._left:
                self._next_header()
                if self._left == 0:
                    self._whole = None
                    yield self._head + (b"",)
                    continue
            size = min(self._left, self._end - self._begin)
            if size == 0:
                return
            piece = self._view[self._begin : self._begin + size]
            self._begin += size
            self._left -= size
            if self._whole is None:
                yield self._head + (piece,)
                continue
            self._whole += piece
            if self._left == 0:
                whole, self._whole = bytes(self._whole), None
                yield self._head + (whole,)

    def _next_header(self) -> None:
        kind, sub, zero, stream, length = HEADER.unpack_from(self._view, self._begin)
        if kind not in KINDS or sub > 2 or zero:
            raise ProtocolError("frame of type %d, sub %d, zero %d: want 1-9, 0-2, 0" % (kind, sub, zero))
        limit = MAX_DATA if kind == DATA else self._max_control if kind >= OPEN else 4
        if length > limit:
            raise ProtocolError("frame of type %d with %d bytes: want at most %d" % (kind, length, limit))
        self._begin += HEAD
        self._head, self._left = (kind, sub, stream), length
        self._whole = None if kind == DATA else bytearray()
