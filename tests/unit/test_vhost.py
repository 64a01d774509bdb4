"""The two ends of vhost-user: what a hostile guest may put into its queues, and what a back-end may answer."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from wnodes_core.storage import vhost_guest, vhost_user, virtiofs, virtiofs_copy
from wnodes_core.storage.vhost_guest import Memory, Parts, Ring

GUEST = 1 << 40  # where the guest believes its memory to begin
SIZE = 1 << 20
RING = 8
DESCRIPTORS, AVAILABLE, USED, DATA = 0, 0x1000, 0x2000, 0x4000
NEXT, WRITE, INDIRECT = 1, 2, 4
INIT, LOOKUP, FORGET, GETATTR = 26, 1, 2, 3
ROOT = 1
as_root = pytest.mark.skipif(os.getuid() != 0, reason="a server that is not confined wants root")


class Ram:
    """Memory of a guest in a QEMU that is this very process."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, SIZE)
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.fd = os.open("/proc/self/mem", os.O_RDWR)
        self.memory = Memory(self.fd)
        self.memory.set_regions(struct.pack("=II", 1, 0) + struct.pack("=QQQQ", GUEST, SIZE, self.place, 0))
        self.ring = Ring(self.memory, RING, *(self.place + at for at in (DESCRIPTORS, USED, AVAILABLE)))
        self.put = 0

    def describe(self, number: int, address: int, length: int, flags: int = 0, following: int = 0, at: int = 0) -> None:
        struct.pack_into("=QIHH", self.map, at + 16 * number, address, length, flags, following)

    def offer(self, *heads: int) -> None:
        """As the guest's driver: into the queue, then its index."""
        for head in heads:
            struct.pack_into("=H", self.map, AVAILABLE + 4 + 2 * (self.put % RING), head)
            self.put += 1
        struct.pack_into("=H", self.map, AVAILABLE + 2, self.put & 0xFFFF)

    def used(self) -> list[tuple[int, int]]:
        count = struct.unpack_from("=H", self.map, USED + 2)[0]
        return [struct.unpack_from("=II", self.map, USED + 4 + 8 * (each % RING)) for each in range(count)]

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


def parts(ram: Ram, most: int = 8) -> list[tuple[int, Parts, Parts]]:
    return list(ram.ring.messages(most))


# the guest's queues


def test_a_chain_is_parts_to_read_and_parts_to_write(ram: Ram) -> None:
    ram.describe(0, GUEST + DATA, 10, NEXT, 3)
    ram.describe(3, GUEST + DATA + 100, 20, NEXT | WRITE, 5)
    ram.describe(5, GUEST + DATA + 120, 30, WRITE)  # right behind it: the same part
    ram.offer(0)
    assert parts(ram) == [(0, [(ram.place + DATA, 10)], [(ram.place + DATA + 100, 50)])]
    assert parts(ram) == [], "nothing new"


def test_a_table_of_its_own_is_a_chain(ram: Ram) -> None:
    ram.describe(0, GUEST + DATA, 40, NEXT, 1, at=0x3000)
    ram.describe(1, GUEST + DATA + 4096, 16, WRITE, at=0x3000)
    ram.describe(2, GUEST + 0x3000, 32, INDIRECT)
    ram.offer(2)
    assert parts(ram) == [(2, [(ram.place + DATA, 40)], [(ram.place + DATA + 4096, 16)])]


def test_no_more_messages_are_taken_than_there_is_room_for(ram: Ram) -> None:
    for number in range(3):
        ram.describe(number, GUEST + DATA, 40)
    ram.offer(0, 1, 2)
    assert [number for number, *_ in parts(ram, 2)] == [0, 1]
    assert parts(ram, 0) == []
    assert [number for number, *_ in parts(ram, 2)] == [2]


def test_the_queue_goes_round(ram: Ram) -> None:
    ram.ring.seen = ram.ring.given = ram.put = 0xFFFE
    ram.describe(0, GUEST + DATA, 40)
    ram.offer(0, 0, 0)
    assert len(parts(ram)) == 3 and ram.ring.seen == 1
    for _ in range(3):
        ram.ring.give_back(0, 7)
    assert struct.unpack_from("=H", ram.map, USED + 2)[0] == 1
    assert struct.unpack_from("=II", ram.map, USED + 4 + 8 * (0xFFFF % RING)) == (0, 7)


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (GUEST - 1, 16),
        (GUEST + SIZE - 15, 16),
        (GUEST + SIZE, 1),
        (0, 16),
        ((1 << 64) - 8, 16),
        (GUEST, SIZE + 1),
        (GUEST, 0xFFFFFFFF),
    ],
)
def test_an_address_that_is_not_the_guests_memory_is_refused(ram: Ram, address: int, length: int) -> None:
    """Right before and right behind it lies the hypervisor's own."""
    ram.describe(0, address, length)
    ram.offer(0)
    with pytest.raises(ValueError, match="want the guest's memory"):
        parts(ram)
    ram.describe(1, address, length, INDIRECT)
    ram.offer(1)
    with pytest.raises(ValueError, match="want the guest's memory|want up to 1024 entries"):
        parts(ram)


def test_a_piece_across_two_regions_is_refused(ram: Ram) -> None:
    half = SIZE // 2
    regions = [(GUEST, half, ram.place, 0), (GUEST + half, half, ram.place + half + 4096, 0)]
    ram.memory.set_regions(struct.pack("=II", 2, 0) + b"".join(struct.pack("=QQQQ", *each) for each in regions))
    with pytest.raises(ValueError, match="want the guest's memory"):
        ram.memory.place(GUEST + half - 1, 2)


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ([(0, GUEST, 1, NEXT, 0)], "without end"),
        ([(0, GUEST, 1, NEXT, 1), (1, GUEST, 1, NEXT, 0)], "without end"),
        ([(0, GUEST, 1, NEXT, RING)], f"part {RING} of {RING}"),
        ([(0, GUEST, 1, NEXT, 0xFFFF)], "part 65535"),
        ([(0, GUEST, 16, INDIRECT), (0, GUEST, 16, INDIRECT)], "table in a chain"),
        ([(0, GUEST, 1, NEXT, 1), (1, GUEST, 16, INDIRECT)], "table in a chain"),
        ([(0, GUEST, 17, INDIRECT)], "want up to 1024 entries"),
        ([(0, GUEST, 0, INDIRECT)], "want up to 1024 entries"),
        ([(0, GUEST, 16 * 1025, INDIRECT)], "want up to 1024 entries"),
    ],
)
def test_a_chain_that_leads_nowhere_is_refused(
    ram: Ram, chain: list[tuple[int, int, int, int, int]], said: str
) -> None:
    for each in chain:
        ram.describe(*each)
    ram.offer(0)
    with pytest.raises(ValueError, match=said):
        parts(ram)


def test_a_head_that_is_no_descriptor_is_refused(ram: Ram) -> None:
    ram.offer(RING)
    with pytest.raises(ValueError, match=f"part {RING}"):
        parts(ram)


def test_a_queue_that_claims_more_than_it_holds_is_refused(ram: Ram) -> None:
    struct.pack_into("=H", ram.map, AVAILABLE + 2, RING + 1)
    with pytest.raises(ValueError, match=f"{RING + 1} messages in a queue of {RING}"):
        parts(ram)


def test_what_is_copied_is_bounded(ram: Ram) -> None:
    room = memoryview(bytearray(100))
    ram.map[DATA : DATA + 100] = bytes(range(100))
    assert ram.memory.gather([(ram.place + DATA, 60), (ram.place + DATA + 60, 40)], room) == 100
    assert bytes(room) == bytes(range(100))
    with pytest.raises(ValueError, match="more than 100 bytes"):
        ram.memory.gather([(ram.place + DATA, 60), (ram.place + DATA, 41)], room)
    ram.memory.scatter(memoryview(b"abcdef"), [(ram.place + DATA, 2), (ram.place + DATA + 10, 2), (ram.place, 0)])
    assert (ram.map[DATA : DATA + 3], ram.map[DATA + 10 : DATA + 13]) == (b"ab\x02", b"cd\x0c")


def test_memory_that_is_gone_is_an_error(ram: Ram) -> None:
    hole = mmap.mmap(-1, 4096)
    place = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(place), ctypes.c_size_t(4096), 0) == 0
    assert libc.munmap(ctypes.c_void_p(place), ctypes.c_size_t(4096)) == 0
    with pytest.raises(OSError):
        ram.memory.read(place, 16)


def test_the_guest_is_interrupted_unless_it_looks_anyway(ram: Ram) -> None:
    ram.ring.call = os.eventfd(0, os.EFD_NONBLOCK)
    ram.ring.interrupt()
    assert os.eventfd_read(ram.ring.call) == 1
    struct.pack_into("=H", ram.map, AVAILABLE, 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT
    ram.ring.interrupt()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(ram.ring.call)
    os.close(ram.ring.call)


# QEMU's end


@pytest.fixture
def qemu(ram: Ram) -> Iterator[tuple[socket.socket, vhost_guest.Guest]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, vhost_guest.Guest(theirs, ram.memory, [Ring(ram.memory), Ring(ram.memory)])


def said(kind: int, payload: bytes, size: int | None = None) -> bytes:
    return struct.pack("=III", kind, 1, len(payload) if size is None else size) + payload


@pytest.mark.parametrize(
    "message",
    [
        said(vhost_user.SET_VRING_NUM, struct.pack("=II", 2, 8)),  # there are two
        said(vhost_user.SET_VRING_KICK, struct.pack("=Q", 7)),
        said(vhost_user.SET_VRING_NUM, b"\1"),
        said(vhost_user.SET_MEM_TABLE, struct.pack("=II", 9, 0)),
        said(vhost_user.SET_VRING_ADDR, b"", 1 << 31),
    ],
)
def test_what_is_no_message_ends_the_device_and_leaves_no_file_open(
    qemu: tuple[socket.socket, vhost_guest.Guest], message: bytes
) -> None:
    ours, guest = qemu
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(ours, [message], [ours.fileno()])
    with pytest.raises(ValueError, match="QEMU"):
        guest.listen()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("far", [-1, SIZE - 16, 1 << 62])
def test_a_queue_that_is_not_in_the_guests_memory_is_refused(
    ram: Ram, qemu: tuple[socket.socket, vhost_guest.Guest], part: int, far: int
) -> None:
    ours, guest = qemu
    ours.sendall(said(vhost_user.SET_VRING_NUM, struct.pack("=II", 0, RING)))
    assert guest.listen()
    places = [ram.place + DESCRIPTORS, ram.place + USED, ram.place + AVAILABLE]
    ours.sendall(said(vhost_user.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *places, 0)))
    assert guest.listen()
    places[part] = ram.place + far
    ours.sendall(said(vhost_user.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *places, 0)))
    with pytest.raises(ValueError, match="want the guest's memory"):
        guest.listen()


def test_who_is_called_anew_looks_at_once(qemu: tuple[socket.socket, vhost_guest.Guest]) -> None:
    """QEMU changes the fd when a guest moves an interrupt, and what was said to the old one may be lost."""
    ours, guest = qemu
    call = os.eventfd(0, os.EFD_NONBLOCK)
    socket.send_fds(ours, [said(vhost_user.SET_VRING_CALL, struct.pack("=Q", 0))], [call])
    assert guest.listen() and os.eventfd_read(call) == 1
    for fd in (call, guest.rings[0].call):
        os.close(fd)


def test_a_queue_is_started_and_stopped(qemu: tuple[socket.socket, vhost_guest.Guest]) -> None:
    ours, guest = qemu
    fds = [os.eventfd(0) for _ in range(3)]
    for kind, fd in zip((vhost_user.SET_VRING_KICK, vhost_user.SET_VRING_CALL, vhost_user.SET_VRING_CALL), fds, strict=True):
        socket.send_fds(ours, [said(kind, struct.pack("=Q", 1))], [fd])
        assert guest.listen()
    ours.sendall(said(vhost_user.SET_VRING_BASE, struct.pack("=II", 1, 5)))
    ours.sendall(said(vhost_user.GET_VRING_BASE, struct.pack("=II", 1, 0)))
    assert guest.listen() and guest.rings[1].kick >= 0 and guest.rings[1].seen == 5
    assert guest.listen() and guest.rings[1].kick == -1 and guest.rings[0].kick == -1
    assert struct.unpack("=IIIII", ours.recv(100)) == (vhost_user.GET_VRING_BASE, 5, 8, 1, 5)
    ours.close()
    assert not guest.listen()
    for fd in (*fds, guest.rings[1].call):
        os.close(fd)


# the server's end


def fuse(opcode: int, body: bytes, node: int = ROOT, unique: int = 7) -> bytes:
    head = struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, node, os.getuid(), os.getgid(), 0, 0)
    return head + body


GREETING = fuse(INIT, struct.pack("=IIII", 7, 31, 1 << 17, 0), 0)


@dataclass
class Server:
    """A real virtiofsd on a folder."""

    folder: Path
    wire: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX))

    def __post_init__(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")
            listener.listen(0)
            words = [virtiofs.find_server(), f"--fd={listener.fileno()}", "-o", f"source={self.folder},sandbox=chroot"]
            self.process = subprocess.Popen(words, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
            self.wire.connect(listener.getsockname())

    def close(self) -> None:
        self.wire.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "file").write_text("content")
    server = Server(tmp_path)
    yield server
    server.close()


def ask(queue: vhost_user.Queue, *messages: bytes, answer_bytes: int = 4096) -> list[bytes]:
    """The answers to messages that are all under way at once."""
    for message in messages:
        slot = queue.free[0]
        queue.room(slot)[: len(message)] = message
        queue.submit(slot, len(message), answer_bytes)
    queue.kick()
    found: list[bytes] = []
    while len(found) < len(messages):
        assert readable(queue.call), "no answer"
        found += [bytes(answer) for _, answer in queue.answers()]
    return found


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 10)[0])


@as_root
def test_the_real_server_answers_what_is_asked_through_a_queue_of_ours(server: Server) -> None:
    queue = vhost_user.Queue(server.wire, 1, 4, 8192)
    (greeted,) = ask(queue, GREETING)
    length, problem, unique = struct.unpack_from("=IiQ", greeted)
    assert (problem, unique, length) == (0, 7, len(greeted))
    for turn in range(1, 20):  # more than the queue has entries
        answers = ask(queue, *(fuse(LOOKUP, b"file\0", unique=turn * 4 + each) for each in range(4)))
        assert [struct.unpack_from("=IiQ", each)[1:] for each in answers] == [(0, turn * 4 + each) for each in range(4)]
    assert len(queue.free) == 4


def test_a_message_that_no_slot_holds_is_refused(server: Server) -> None:
    queue = vhost_user.Queue(server.wire, 1, 2, 4096)
    with pytest.raises(ValueError, match="want 4096 at most"):
        queue.submit(0, 4000, 100)
    assert queue.free == [0, 1]


@pytest.mark.parametrize("slots", [0, 3, 64])
def test_slots_are_a_power_of_two(slots: int) -> None:
    with socket.socket() as wire, pytest.raises(ValueError, match="power of two"):
        vhost_user.Queue(wire, 1, slots, 4096)


class Liar(threading.Thread):
    """A back-end that answers what it likes."""

    def __init__(self, wire: socket.socket, features: int = vhost_user.VERSION_1 | vhost_user.PROTOCOL_FEATURES) -> None:
        super().__init__(daemon=True)
        self.wire, self.features = wire, features
        self.memory: mmap.mmap | None = None
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # the test is over
            self.lie()

    def lie(self) -> None:
        while True:
            head, fds, _, _ = socket.recv_fds(self.wire, 12, 4)
            if len(head) < 12:
                return
            kind, _, size = struct.unpack("=III", head)
            payload = self.wire.recv(size) if size else b""
            if kind in (vhost_user.GET_FEATURES, vhost_user.GET_PROTOCOL_FEATURES):
                value = self.features if kind == vhost_user.GET_FEATURES else 0
                self.wire.sendall(struct.pack("=IIIQ", kind, 5, 8, value))
            if kind == vhost_user.SET_MEM_TABLE:
                self.memory = mmap.mmap(fds[0], struct.unpack_from("=QQ", payload, 8)[1])
            for fd in fds:
                os.close(fd)

    def answer(self, descriptor: int, length: int) -> None:
        assert self.memory is not None
        struct.pack_into("=II", self.memory, 2048 + 4, descriptor, length)
        struct.pack_into("=H", self.memory, 2048 + 2, 1)


@pytest.mark.parametrize(
    ("descriptor", "length"), [(0, 101), (2, 16), (1, 16), (0xFFFFFFFF, 16), (0, 0xFFFFFFFF)]
)
def test_a_back_end_that_lies_is_found_out(descriptor: int, length: int) -> None:
    """It is a program of the user's that a guest may have taken over."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        liar = Liar(theirs)
        queue = vhost_user.Queue(ours, 1, 2, 4096)
        queue.submit(0, 40, 100)
        while liar.memory is None:
            pass
        liar.answer(descriptor, length)
        with pytest.raises(ValueError, match="which it was not asked for"):
            list(queue.answers())


def test_a_back_end_that_cannot_do_it_is_told(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Liar(theirs, features=0)
        with pytest.raises(ValueError, match="offers 0x0"):
            vhost_user.Queue(ours, 1, 2, 4096)


def test_one_that_hangs_up_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(OSError):
        vhost_user.Queue(ours, 1, 2, 4096)


def test_a_processor_without_the_order_of_stores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vhost_user.usable() == ""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n", "6", "v", "aarch64")))
    assert "memory barriers" in vhost_user.usable()


# both


def stop(pid: int) -> None:
    """Stop a process; once this returns none of its threads runs."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    while any(each.joinpath("stat").read_text().rpartition(") ")[2][0] != "T" for each in threads):
        assert time.monotonic() < deadline


def put(ram: Ram, number: int, message: bytes) -> None:
    """A message and room for its answer, as entries 2n and 2n + 1."""
    start = DATA + 1024 * number
    ram.map[start : start + len(message)] = message
    ram.describe(2 * number, GUEST + start, len(message), NEXT, 2 * number + 1)
    ram.describe(2 * number + 1, GUEST + start + 512, 512, WRITE)
    ram.offer(2 * number)


def answers(ram: Ram, count: int) -> dict[int, bytes]:
    """The answers by entry, once there are so many."""
    while len(ram.used()) < count:
        assert readable(ram.ring.call), "no interrupt"
        os.eventfd_read(ram.ring.call)
    return {number: ram.map[DATA + 512 * number + 512 :][:length] for number, length in ram.used()}


@pytest.fixture
def copied(ram: Ram, qemu: tuple[socket.socket, vhost_guest.Guest], server: Server) -> Iterator[socket.socket]:
    """QEMU's end of a copier between the guest's queue and a real server."""
    ours, guest = qemu
    ram.ring.kick, ram.ring.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    guest.rings = [ram.ring]
    copier = virtiofs_copy.Copier(guest, vhost_user.Queue(server.wire, 1, 2, 8192), server.wire)
    copying = threading.Thread(target=copier.copy)
    copying.start()
    yield ours
    ours.close()
    copying.join(10)
    assert not copying.is_alive()
    for fd in {ram.ring.kick, ram.ring.call} - {-1}:
        os.close(fd)


def restart(copied: socket.socket, base: int) -> int:
    """As QEMU does it once the VM, or its driver, goes on: the queue's new kick."""
    copied.sendall(said(vhost_user.SET_VRING_BASE, struct.pack("=II", 0, base)))
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    socket.send_fds(copied, [said(vhost_user.SET_VRING_KICK, struct.pack("=Q", 0))], [kick])
    return kick


def pause(copied: socket.socket) -> int:
    copied.sendall(said(vhost_user.GET_VRING_BASE, struct.pack("=II", 0, 0)))
    base: int = struct.unpack("=IIIII", copied.recv(100))[-1]
    return base


def under_way(ram: Ram, server: Server, *questions: bytes, taken: int) -> None:
    """Greet the server, stop it and ask: so many of the questions have been taken out of the queue then."""
    put(ram, 0, GREETING)
    os.eventfd_write(ram.ring.kick, 1)
    answers(ram, 1)
    stop(server.process.pid)
    for number, message in enumerate(questions, 1):
        put(ram, number, message)
    os.eventfd_write(ram.ring.kick, 1)
    deadline = time.monotonic() + 10
    while ram.ring.seen < 1 + taken:
        assert time.monotonic() < deadline


@as_root
def test_what_the_guest_asks_is_answered_in_its_memory(ram: Ram, copied: socket.socket) -> None:
    for number, message in enumerate((GREETING, *(fuse(LOOKUP, b"file\0", unique=each) for each in range(1, 4)))):
        put(ram, number, message)
    os.eventfd_write(ram.ring.kick, 1)  # more than there are slots
    for answer in answers(ram, 4).values():
        assert struct.unpack_from("=Ii", answer) == (len(answer), 0), answer


@as_root
def test_what_is_answered_while_the_vm_is_paused_is_given_back_when_it_goes_on(
    ram: Ram, copied: socket.socket, server: Server
) -> None:
    under_way(ram, server, fuse(LOOKUP, b"file\0"), taken=1)
    assert pause(copied) == 2, "at once: QEMU waits for it"
    os.kill(server.process.pid, signal.SIGCONT)
    time.sleep(0.2)
    assert len(ram.used()) == 1, "a queue that stands still was written to"
    kick = restart(copied, 2)
    put(ram, 2, fuse(LOOKUP, b"file\0"))
    os.eventfd_write(kick, 1)
    assert list(answers(ram, 3)) == [0, 2, 4]
    os.close(kick)


@as_root
def test_what_waits_in_a_queue_that_goes_on_is_asked_without_a_kick(
    ram: Ram, copied: socket.socket, server: Server
) -> None:
    three = [fuse(LOOKUP, b"file\0", unique=number) for number in (1, 2, 3)]
    under_way(ram, server, *three, taken=2)  # there are two slots
    assert pause(copied) == 3
    os.kill(server.process.pid, signal.SIGCONT)
    kick = restart(copied, 3)
    assert sorted(answers(ram, 4)) == [0, 2, 4, 6]
    os.close(kick)


@as_root
def test_a_guest_that_begins_anew_is_not_answered_what_it_asked_before(
    ram: Ram, copied: socket.socket, server: Server
) -> None:
    """What was the answer's place is something else by now."""
    under_way(ram, server, fuse(LOOKUP, b"file\0"), taken=1)
    pause(copied)
    ram.map[:DATA] = bytes(DATA)
    ram.map[DATA : DATA + 4096] = b"x" * 4096
    ram.put = 0
    kick = restart(copied, 0)
    os.kill(server.process.pid, signal.SIGCONT)
    put(ram, 3, fuse(LOOKUP, b"file\0", unique=9))
    os.eventfd_write(kick, 1)
    assert list(answers(ram, 1)) == [6]
    assert ram.map[DATA : DATA + 3 * 1024] == b"x" * 3 * 1024
    os.close(kick)


@as_root
def test_once_the_server_has_died_all_is_refused_at_once(ram: Ram, copied: socket.socket, server: Server) -> None:
    under_way(ram, server, *(fuse(LOOKUP, b"file\0", unique=10 + number) for number in (1, 2)), taken=2)
    server.process.kill()
    refused = {number: (16, -errno.ENOTCONN, 10 + number // 2) for number in (2, 4)}
    found = answers(ram, 3)
    assert {number: struct.unpack("=IiQ", found[number]) for number in refused} == refused
    forget = fuse(FORGET, bytes(8))
    ram.map[0x3000 : 0x3000 + len(forget)] = forget
    ram.describe(7, GUEST + 0x3000, len(forget))
    ram.offer(7)
    put(ram, 0, fuse(GETATTR, bytes(16), unique=13))
    os.eventfd_write(ram.ring.kick, 1)
    assert struct.unpack("=IiQ", answers(ram, 5)[0]) == (16, -errno.ENOTCONN, 13)
    assert (7, 0) in ram.used(), "what wants no answer is given back all the same"
