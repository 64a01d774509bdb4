"""The queues of a guest whose memory is its own, for a vhost-user back-end that copies what is in them.

A back-end is meant to map the guest's memory, which must be shared for that; a clone's is private, copied on write
from its template's. So here it is read and written where QEMU has it, through an open /proc/PID/mem (proc(5)).
Contract: QEMU's docs/interop/vhost-user.rst; split virtqueues of the Virtio specification 1.1, section 2.6. The guest
is hostile, and so is what its queues hold: an address that is not its memory, or a chain without end, is an error.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from wnodes_core.storage import vhost_user as v

_INDIRECT_DESC = 1 << 28  # VIRTIO_F_INDIRECT_DESC: one entry of a queue for each message, whatever its parts
_FEATURES = v.VERSION_1 | v.PROTOCOL_FEATURES | _INDIRECT_DESC
_MULTIQUEUE = 1  # VHOST_USER_PROTOCOL_F_MQ: QEMU asks how many queues there are
_NEXT, _WRITE, _INDIRECT = 1, 2, 4  # VIRTQ_DESC_F_*
_NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_*
_DESCRIPTOR = struct.Struct("=QIHH")
_MOST_PARTS = 1024  # of one message, as in QEMU (VIRTQUEUE_MAX_SIZE)
_MOST_FDS = 8  # of one message of QEMU's: a region of memory each
_MOST_PAYLOAD = 4096

Parts = list[tuple[int, int]]  # where in QEMU, bytes


class Memory:
    """The guest's memory where QEMU has it; ``fd`` is its /proc/PID/mem."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._regions: list[tuple[int, int, int]] = []  # the guest's first address and the one behind the last, QEMU's

    def set_regions(self, told: bytes) -> None:
        """As SET_MEM_TABLE has them: guest's address, bytes, QEMU's address, offset in the file."""
        count = struct.unpack_from("=I", told)[0]
        found = [struct.unpack_from("=QQQQ", told, 8 + 32 * each) for each in range(count)]
        self._regions = [(start, start + size, ours) for start, size, ours, _ in found]

    def place(self, address: int, length: int) -> int:
        """QEMU's address of a piece of the guest's memory. Raises ValueError if it is not all of one region."""
        for start, end, ours in self._regions:
            if start <= address and address + length <= end:
                return ours + address - start
        raise ValueError(f"{length} bytes at {address:#x}: want the guest's memory")

    def check(self, place: int, length: int) -> None:
        """Raises ValueError if a piece of QEMU's memory is not the guest's."""
        if not any(ours <= place and place + length <= ours + end - start for start, end, ours in self._regions):
            raise ValueError(f"{length} bytes at {place:#x} of QEMU: want the guest's memory")

    def read(self, place: int, length: int) -> bytes:
        """Raises OSError if QEMU has gone."""
        found = os.pread(self._fd, length, place)
        if len(found) < length:
            raise OSError(f"{len(found)} bytes of {length} at {place:#x} of QEMU")
        return found

    def write(self, place: int, data: bytes) -> None:
        """Raises OSError."""
        if os.pwrite(self._fd, data, place) < len(data):
            raise OSError(f"QEMU has gone from {place:#x}")

    def gather(self, parts: Parts, into: memoryview) -> int:
        """Copy the parts one behind the other: their bytes. Raises OSError, ValueError if they are more than fit."""
        at = 0
        for place, length in parts:
            if at + length > len(into):
                raise ValueError(f"a message of more than {len(into)} bytes")
            self._whole(os.preadv, into[at : at + length], place)
            at += length
        return at

    def scatter(self, data: memoryview, parts: Parts) -> None:
        """The reverse, as far as the data go."""
        at = 0
        for place, length in parts:
            self._whole(os.pwritev, data[at : at + length], place)
            at += length

    def _whole(self, call: Callable[[int, list[memoryview], int], int], piece: memoryview, place: int) -> None:
        while piece:
            count = call(self._fd, [piece], place)
            if not count:
                raise OSError("QEMU has gone")
            piece, place = piece[count:], place + count


@dataclass(eq=False)
class Ring:
    """One of the guest's queues, as QEMU has told of it; a ``kick`` of -1 is one that does not run."""

    memory: Memory
    size: int = 0
    descriptors: int = 0
    used: int = 0
    available: int = 0
    kick: int = -1
    call: int = -1
    seen: int = 0  # of the messages that the guest has put there
    given: int = 0  # of those that it was given back
    life: int = 0  # grows when the guest has begun anew: what it asked before, nobody waits for any more

    def messages(self, most: int) -> Iterator[tuple[int, Parts, Parts]]:
        """The next messages that the guest has put there: number, parts to read, parts for the answer.

        Raises OSError, ValueError.
        """
        if not most:
            return
        there = struct.unpack_from("=H", self.memory.read(self.available, 4), 2)[0]
        count = (there - self.seen) & 0xFFFF
        if count > self.size:
            raise ValueError(f"{count} messages in a queue of {self.size}")
        if not count:
            return
        head = self.memory.read(self.available, 4 + 2 * self.size)  # later than the index, which says what is there
        table = self.memory.read(self.descriptors, 16 * self.size)
        for _ in range(min(count, most)):
            number = struct.unpack_from("=H", head, 4 + 2 * (self.seen % self.size))[0]
            self.seen = (self.seen + 1) & 0xFFFF
            yield number, *self._parts(table, number)

    def _parts(self, table: bytes, number: int) -> tuple[Parts, Parts]:
        address, length, flags, _ = _entry(table, number)
        if flags & _INDIRECT:
            if not 0 < length <= 16 * _MOST_PARTS or length % 16:
                raise ValueError(f"a table of {length} bytes: want up to {_MOST_PARTS} entries of 16")
            table, number = self.memory.read(self.memory.place(address, length), length), 0
        reading: Parts = []
        writing: Parts = []
        for _ in range(len(table) // 16):
            address, length, flags, number = _entry(table, number)
            if flags & _INDIRECT:
                raise ValueError("a table in a chain")
            _add(writing if flags & _WRITE else reading, self.memory.place(address, length), length)
            if not flags & _NEXT:
                return reading, writing
        raise ValueError("a chain without end")

    def give_back(self, number: int, length: int) -> None:
        """Say that a message is done, and so much of its parts written. Raises OSError."""
        at = self.used + 4 + 8 * (self.given % self.size)
        self.memory.write(at, struct.pack("=II", number, length))
        self.given = (self.given + 1) & 0xFFFF
        # With the flags before it, which are ours: the kernel copies four bytes that are aligned at once, and two as
        # one and one (measured: a reader saw 0x1ff between 0xff and 0x100).
        self.memory.write(self.used, struct.pack("=HH", 0, self.given))

    def interrupt(self) -> None:
        """Have the guest look at what it was given back, unless it said that it does so anyway. Raises OSError."""
        if self.call >= 0 and not struct.unpack("=H", self.memory.read(self.available, 2))[0] & _NO_INTERRUPT:
            os.eventfd_write(self.call, 1)


def _entry(table: bytes, number: int) -> tuple[int, int, int, int]:
    """Address, bytes, flags, the next one's number. Raises ValueError."""
    if 16 * number >= len(table):
        raise ValueError(f"part {number} of {len(table) // 16}")
    entry: tuple[int, int, int, int] = _DESCRIPTOR.unpack_from(table, 16 * number)
    return entry


def _add(parts: Parts, place: int, length: int) -> None:
    """One more part; pages side by side are one."""
    if parts and sum(parts[-1]) == place:
        parts[-1] = parts[-1][0], parts[-1][1] + length
    else:
        parts.append((place, length))


@dataclass
class Guest:
    """What QEMU tells of its guest over ``qemu``, the connection of a vhost-user device."""

    qemu: socket.socket
    memory: Memory
    rings: list[Ring] = field(default_factory=list)

    def listen(self) -> bool:
        """Take one message of QEMU's; False once it has hung up. Raises OSError, ValueError."""
        head, fds, _, _ = socket.recv_fds(self.qemu, 12, _MOST_FDS, socket.MSG_WAITALL)
        try:
            if len(head) < 12:
                return False
            kind, _, size = struct.unpack("=III", head)
            if size > _MOST_PAYLOAD:
                raise ValueError(f"QEMU says {size} bytes in message {kind}")
            payload = self.qemu.recv(size, socket.MSG_WAITALL) if size else b""
            if kind in (v.SET_VRING_KICK, v.SET_VRING_CALL):
                self._set_fd(kind, payload, fds)
                fds = []
            else:
                self._apply(kind, payload)
        except (struct.error, IndexError) as error:
            raise ValueError(f"QEMU's message {head.hex()}: {error}") from error
        finally:
            for fd in fds:  # of its memory, which is not shared with us
                os.close(fd)
        return True

    def _set_fd(self, kind: int, payload: bytes, fds: Sequence[int]) -> None:
        ring = self.rings[struct.unpack("=Q", payload)[0] & 0xFF]
        name = "kick" if kind == v.SET_VRING_KICK else "call"
        if getattr(ring, name) >= 0:
            os.close(getattr(ring, name))
        setattr(ring, name, fds[0] if fds else -1)
        if kind == v.SET_VRING_CALL and fds:
            os.eventfd_write(ring.call, 1)  # what was said to the one before it may have been lost
        elif kind == v.SET_VRING_KICK and ring.used:  # it starts, maybe again: what was given back says its memory
            ring.given = struct.unpack("=H", self.memory.read(ring.used + 2, 2))[0]

    def _apply(self, kind: int, payload: bytes) -> None:
        offered = {v.GET_FEATURES: _FEATURES, v.GET_PROTOCOL_FEATURES: _MULTIQUEUE, v.GET_QUEUE_NUM: len(self.rings)}
        if kind in offered:
            self._reply(kind, struct.pack("=Q", offered[kind]))
        elif kind == v.SET_MEM_TABLE:
            self.memory.set_regions(payload)
        elif kind == v.SET_VRING_ADDR:
            number, _, descriptors, used, available, _ = struct.unpack("=IIQQQQ", payload)
            ring = self.rings[number]
            self.memory.check(descriptors, 16 * ring.size)
            self.memory.check(available, 4 + 2 * ring.size)
            self.memory.check(used, 4 + 8 * ring.size)
            ring.descriptors, ring.used, ring.available = descriptors, used, available
        elif kind in (v.SET_VRING_NUM, v.SET_VRING_BASE, v.GET_VRING_BASE):
            number, value = struct.unpack("=II", payload)
            self._set_ring(kind, number, value)
        # All others (owner, features, enabling) change nothing for who has nothing to lose.

    def _set_ring(self, kind: int, number: int, value: int) -> None:
        ring = self.rings[number]
        if kind == v.SET_VRING_NUM:
            ring.size = value
        elif kind == v.SET_VRING_BASE:
            ring.life += value != ring.seen
            ring.seen = value
        else:  # GET_VRING_BASE stops it
            self._reply(kind, struct.pack("=II", number, ring.seen))
            with suppress(OSError):
                os.close(ring.kick)
            ring.kick = -1

    def _reply(self, kind: int, payload: bytes) -> None:
        self.qemu.sendall(struct.pack("=III", kind, v.VERSION | v.REPLY, len(payload)) + payload)
