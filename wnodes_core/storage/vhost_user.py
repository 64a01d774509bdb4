"""A vhost-user front-end without a VM: hands messages to a device's back-end and takes back its answers.

virtiofsd expects a hypervisor that shares its guest's memory; here that memory is a memfd of our own with one queue
and a few slots, and a message is whatever bytes a slot is given. Contract: QEMU's docs/interop/vhost-user.rst, and
the split virtqueues of the Virtio specification 1.1, section 2.6. Not a step waits for the back-end but ``Queue()``.

Numbers that both sides read are stored in the order in which they are written here, which holds on x86 and wants
a memory barrier elsewhere, that Python has none of (``usable``).
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

# vhost-user.rst: front-end message types, their version and the flag of a reply
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL = 8, 9, 10, 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE = 15, 16, 18
VERSION, REPLY = 1, 4
GET_VRING_BASE, GET_QUEUE_NUM = 11, 17
PROTOCOL_FEATURES, VERSION_1 = 1 << 30, 1 << 32
_NEXT, _WRITE = 1, 2  # VIRTQ_DESC_F_*
_START_TIMEOUT_S = 10.0

_BASE = 1 << 32  # where the memory begins, for the back-end: any number but 0
_RINGS_BYTES = mmap.PAGESIZE
_DESCRIPTORS, _AVAILABLE, _USED = 0, 1024, 2048  # offsets of the three parts of the queue
_MOST_SLOTS = 32  # two descriptors each: 64 x 16 bytes are the room of the first part


def usable() -> str:
    """'' if this machine keeps the order of our stores, else why it cannot be done here."""
    return "" if os.uname().machine == "x86_64" else "this processor wants memory barriers, which Python has none of"


class Queue:
    """One queue of a back-end's, with ``slots`` messages under way at most, of ``slot_bytes`` with their answers.

    ``call`` is the fd that becomes readable once there are answers (``answers``), ``free`` the numbers of the slots
    that nothing is in. Raises OSError, also where the back-end does not say in time what it can; ValueError if it
    does not speak the protocol.
    """

    def __init__(self, backend: socket.socket, number: int, slots: int, slot_bytes: int) -> None:
        if not 0 < slots <= _MOST_SLOTS or slots & (slots - 1):
            raise ValueError(f"{slots} slots: want a power of two up to {_MOST_SLOTS}")
        self._slot_bytes = slot_bytes
        self._size = 2 * slots
        self._backend = backend
        self.free = list(range(slots))
        self._asked, self._answered = 0, 0
        self._places: dict[int, tuple[int, int]] = {}  # of the answers to come: offset in its slot, most bytes
        bytes_in_all = _RINGS_BYTES + slots * slot_bytes
        memory = os.memfd_create("wnodes-queue", os.MFD_CLOEXEC)
        os.ftruncate(memory, bytes_in_all)
        self._memory = memoryview(mmap.mmap(memory, bytes_in_all))
        self._kick, self.call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        backend.settimeout(_START_TIMEOUT_S)
        self._greet(memory, bytes_in_all)
        self._set_up(number)
        os.close(memory)

    def _greet(self, memory: int, size: int) -> None:
        offered = self._ask(GET_FEATURES)
        wanted = VERSION_1 | PROTOCOL_FEATURES
        if offered & wanted != wanted:
            raise ValueError(f"the back-end offers {offered:#x}: want {wanted:#x}")
        self._ask(GET_PROTOCOL_FEATURES)
        self._tell(SET_PROTOCOL_FEATURES, struct.pack("=Q", 0))
        self._tell(SET_OWNER)
        self._tell(SET_FEATURES, struct.pack("=Q", wanted))
        region = struct.pack("=QQQQ", _BASE, size, _BASE, 0)  # there, bytes, the same by our own address, in the file
        self._tell(SET_MEM_TABLE, struct.pack("=II", 1, 0) + region, memory)

    def _set_up(self, number: int) -> None:
        self._tell(SET_VRING_NUM, struct.pack("=II", number, self._size))
        self._tell(SET_VRING_BASE, struct.pack("=II", number, 0))
        places = [_BASE + each for each in (_DESCRIPTORS, _USED, _AVAILABLE)]
        self._tell(SET_VRING_ADDR, struct.pack("=IIQQQQ", number, 0, *places, 0))
        self._tell(SET_VRING_CALL, struct.pack("=Q", number), self.call)
        self._tell(SET_VRING_KICK, struct.pack("=Q", number), self._kick)
        self._tell(SET_VRING_ENABLE, struct.pack("=II", number, 1))

    def _tell(self, kind: int, payload: bytes = b"", *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._backend.sendmsg([struct.pack("=III", kind, VERSION, len(payload)) + payload], rights)

    def _ask(self, kind: int) -> int:
        self._tell(kind)
        said = b""
        while len(said) < 20:
            data = self._backend.recv(20 - len(said))
            if not data:
                raise OSError("the back-end has hung up")
            said += data
        answered, flags, size, value = struct.unpack("=IIIQ", said)
        if (answered, flags & 7, size) != (kind, VERSION | REPLY, 8):
            raise ValueError(f"the back-end says {said.hex()} to message {kind}")
        return int(value)

    def room(self, slot: int) -> memoryview:
        """The memory of a slot of ours: the message from its start on, its answer behind that."""
        start = _RINGS_BYTES + slot * self._slot_bytes
        return self._memory[start : start + self._slot_bytes]

    def submit(self, slot: int, length: int, answer_bytes: int) -> None:
        """Hand over the message of so many bytes in a free slot, with room for so much of an answer (0: it has none).

        The back-end is woken by ``kick``. Raises ValueError if both together are more than a slot holds.
        """
        behind = (length + 15) & ~15
        if behind + answer_bytes > self._slot_bytes:
            raise ValueError(f"{length} bytes and {answer_bytes} for the answer: want {self._slot_bytes} at most")
        self.free.remove(slot)
        self._places[slot] = (behind, answer_bytes)
        first = 2 * slot
        place = _BASE + _RINGS_BYTES + slot * self._slot_bytes
        self._put("=QIHH", _DESCRIPTORS + 16 * first, place, length, _NEXT if answer_bytes else 0, first + 1)
        self._put("=QIHH", _DESCRIPTORS + 16 * (first + 1), place + behind, answer_bytes, _WRITE, 0)
        self._put("=H", _AVAILABLE + 4 + 2 * (self._asked % self._size), first)
        self._asked = (self._asked + 1) & 0xFFFF
        self._put("=H", _AVAILABLE + 2, self._asked)

    def _put(self, layout: str, offset: int, *values: int) -> None:
        struct.pack_into(layout, self._memory, offset, *values)

    def kick(self) -> None:
        """Wake the back-end for what was handed over."""
        os.eventfd_write(self._kick, 1)

    def answers(self) -> Iterator[tuple[int, memoryview]]:
        """What the back-end has answered, in its order; an answer's slot is free again once the next one is asked for.

        Raises ValueError if it answers what nobody asked.
        """
        with suppress(BlockingIOError):
            os.eventfd_read(self.call)
        while self._answered != struct.unpack_from("=H", self._memory, _USED + 2)[0]:
            at = _USED + 4 + 8 * (self._answered % self._size)
            descriptor, length = struct.unpack_from("=II", self._memory, at)
            slot = descriptor // 2
            behind, most = self._places.pop(slot, (0, -1))
            if length > most or descriptor % 2:
                raise ValueError(f"the back-end answers {length} bytes in {descriptor}, which it was not asked for")
            self._answered = (self._answered + 1) & 0xFFFF
            yield slot, self.room(slot)[behind : behind + length]
            self.free.append(slot)
