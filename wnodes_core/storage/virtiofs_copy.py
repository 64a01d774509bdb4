"""The gateway of a VM that shares no memory: copies between its device and a virtiofsd, our child.

``virtiofs_copy STARTER LISTENER MEMORY LOG ro|rw SOURCE SERVER [ARGUMENT…]``, called by unshare(1) in a fresh user
and mount namespace as ``virtiofs_exec`` is, and like that bound to die with STARTER. QEMU calls at LISTENER as it
would call virtiofsd; MEMORY is its /proc/PID/mem, open. What the guest asks of its device is copied into a queue of
our own (``vhost_user``), at whose other end virtiofsd is, and the answers back: for each message one copy more than
with shared memory, on the host, where it is cheap. Once the server has died every question is answered with ENOTCONN.
Among the server's ARGUMENTs its own socket is called ``SERVER_FD``.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from typing import NamedTuple

from wnodes_core.storage import calls, vhost_guest, vhost_user, virtiofs_exec

SERVER_FD = -1  # stands for a number that only we know
_QUEUES = 2  # Virtio 1.1, 5.11.2: one for urgent messages, one for requests
_REQUESTS = 1
# A message of 1 MiB (the most that virtiofsd agrees to) with its words, its answer and their alignment.
_SLOTS, _SLOT_BYTES = 8, (1 << 20) + (16 << 10)
_CALL_TIMEOUT_S = 30.0


class Question(NamedTuple):
    """A message under way: its queue in what life, its number there, where its answer goes."""

    ring: vhost_guest.Ring
    life: int
    number: int
    writing: vhost_guest.Parts


class Copier:
    """Between a guest's queues and the server's."""

    def __init__(self, guest: vhost_guest.Guest, queue: vhost_user.Queue, server: socket.socket) -> None:
        self._guest, self._queue, self._server = guest, queue, server
        self._dead = False  # the server
        self._asked: dict[int, Question] = {}  # by slot
        self._held: list[tuple[Question, bytes]] = []  # of a VM that is paused
        self._answered: set[vhost_guest.Ring] = set()  # queues with answers that the guest was not told of

    def copy(self) -> None:
        """Until QEMU has gone. Raises OSError, ValueError."""
        qemu, server = self._guest.qemu.fileno(), self._server.fileno()
        while True:
            kicks = [ring.kick for ring in self._guest.rings if ring.kick >= 0]
            waiting = select.poll()
            for fd in (qemu, *kicks, *(() if self._dead else (self._queue.call, server))):
                waiting.register(fd, select.POLLIN)
            ready: set[int] = set()
            while qemu not in ready and server not in ready:  # what changes for whom we wait
                ready = {fd for fd, _ in waiting.poll()}
                for fd in ready.intersection(kicks):
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                if self._queue.call in ready:
                    self._answer()
                self._ask()
                self._interrupt()
            if server in ready:
                self._mourn()
            if qemu in ready and not self._guest.listen():
                return
            self._resume()

    def _ask(self) -> None:
        """Hand over what the guest has put into its queues and for which there are slots."""
        before = len(self._asked)
        for ring in self._guest.rings:
            if ring.kick < 0:
                continue
            for number, reading, writing in ring.messages(ring.size if self._dead else len(self._queue.free)):
                slot = 0 if self._dead else self._queue.free[-1]
                length = self._guest.memory.gather(reading, self._queue.room(slot))
                question = Question(ring, ring.life, number, writing)
                if self._dead:
                    self._refuse(slot, question)
                    continue
                self._queue.submit(slot, length, sum(each for _, each in writing))
                self._asked[slot] = question
        if len(self._asked) > before:
            self._queue.kick()

    def _answer(self) -> None:
        for slot, answer in self._queue.answers():
            self._give(self._asked.pop(slot), answer)

    def _give(self, question: Question, answer: memoryview) -> None:
        ring, life, number, writing = question
        if ring.kick < 0:
            self._held.append((question, bytes(answer)))
        elif life == ring.life:
            self._guest.memory.scatter(answer, writing)
            ring.give_back(number, len(answer))
            self._answered.add(ring)

    def _interrupt(self) -> None:
        while self._answered:
            self._answered.pop().interrupt()

    def _mourn(self) -> None:
        """The server has gone: give back what it answered, and refuse all else, from now on."""
        self._answer()
        self._dead = True
        for slot, question in self._asked.items():
            self._refuse(slot, question)
        self._asked.clear()

    def _refuse(self, slot: int, question: Question) -> None:
        """Answer the message of a slot as a mount whose server has ended (struct fuse_out_header)."""
        answer = struct.pack("=Ii", 16, -errno.ENOTCONN) + bytes(self._queue.room(slot)[8:16])
        self._give(question, memoryview(answer if question.writing else b""))

    def _resume(self) -> None:
        """Answer what was answered while its queue stood still, and see what has been asked."""
        held, self._held = self._held, []
        for question, answer in held:
            self._give(question, memoryview(answer))
        self._ask()
        self._interrupt()


def main(argv: list[str]) -> None:
    """Ends with QEMU. Raises OSError, ValueError."""
    starter, listener, memory, log, mode, source, *server = argv
    with socket.socket(socket.AF_UNIX) as waiting, socket.socket(socket.AF_UNIX) as ours:
        # Nobody else can have called: the queue of a backlog of 0 has one place.
        waiting.bind("")
        waiting.listen(0)
        ours.setblocking(False)
        ours.connect(waiting.getsockname())
        us = os.getpid()
        if os.fork() == 0:
            for fd in (int(listener), int(memory)):
                os.close(fd)
            _serve(us, waiting.fileno(), int(log), mode == "ro", source, server)
        waiting.close()
        _shut_out()
        if os.getppid() != int(starter):  # it has gone already
            sys.exit("virtiofs: nobody is left to serve")
        queue = vhost_user.Queue(ours, _REQUESTS, _SLOTS, _SLOT_BYTES)
        os.write(2, b"\0")
        os.dup2(int(log), 2)
        with socket.socket(fileno=int(listener)) as calls_here:
            calls_here.settimeout(_CALL_TIMEOUT_S)
            qemu, _ = calls_here.accept()
        qemu.settimeout(None)
        guest = vhost_guest.Guest(qemu, vhost_guest.Memory(int(memory)))
        guest.rings += [vhost_guest.Ring(guest.memory) for _ in range(_QUEUES)]
        Copier(guest, queue, ours).copy()


def _shut_out() -> None:
    """Live no longer than our starter, have no rights and see no files; be seen by nobody. Raises OSError.

    The server is the user too, in the same namespace, and speaks with the guest: it must not read our MEMORY.
    """
    calls.hide()
    calls.die_with_parent()
    virtiofs_exec.leave_all()
    calls.keep_capabilities(())


def _serve(parent: int, listener: int, log: int, read_only: bool, source: str, server: list[str]) -> None:
    """Become the server, in the child. Never returns."""
    problems = os.dup(2)
    try:
        calls.unshare_mounts()
        program = virtiofs_exec.shut_in(source, read_only=read_only, server=server[0])
        calls.die_with_parent()
        calls.forgo(calls.SYS_PTRACE)  # or it could, whatever its parent says
        os.dup2(log, 2)
        os.close(log)
        os.set_inheritable(listener, True)
        argv = [f"--fd={listener}" if word == f"--fd={SERVER_FD}" else word for word in server]
        if os.getppid() == parent:
            os.execve(program, argv, dict(os.environ))
    except OSError as error:
        os.write(problems, f"{server[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"virtiofs: {error}")
