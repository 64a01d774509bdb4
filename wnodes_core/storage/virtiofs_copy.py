"""Becomes virtiofsd for a VM that shares no memory, with a child between them that copies.

``virtiofs_copy STARTER LISTENER MEMORY LOG ro|rw SOURCE SERVER [ARGUMENT…]``, called by unshare(1) in a fresh user
and mount namespace as ``virtiofs_exec`` is, and like that bound to die with STARTER. QEMU calls at LISTENER as it
would call virtiofsd; MEMORY is its /proc/PID/mem, open. What the guest asks of its device the child copies into a
queue of our own (``vhost_user``), at whose other end virtiofsd is, and the answers back: for each message one copy
more than with shared memory, on the host, where it is cheap. The server's ARGUMENTs name its own socket ``SERVER_FD``.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from contextlib import suppress
from typing import NamedTuple

from wnodes_core.storage import calls, vhost_guest, vhost_user, virtiofs_exec

SERVER_FD = 3
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

    def __init__(self, guest: vhost_guest.Guest, queue: vhost_user.Queue) -> None:
        self._guest, self._queue = guest, queue
        self._asked: dict[int, Question] = {}  # by slot
        self._held: list[tuple[Question, bytes]] = []  # of a VM that is paused

    def copy(self, server: socket.socket) -> None:
        """Until QEMU or the server has gone. Raises OSError, ValueError."""
        qemu = self._guest.qemu.fileno()
        while True:
            kicks = [ring.kick for ring in self._guest.rings if ring.kick >= 0]
            waiting = select.poll()
            for fd in (self._queue.call, server.fileno(), qemu, *kicks):
                waiting.register(fd, select.POLLIN)
            ready: set[int] = set()
            while qemu not in ready:  # which may give us other queues
                ready = {fd for fd, _ in waiting.poll()}
                if server.fileno() in ready:
                    return
                for fd in ready.intersection(kicks):
                    with suppress(BlockingIOError):
                        os.eventfd_read(fd)
                if self._queue.call in ready:
                    self._answer()
                self._ask()
            if not self._guest.listen():
                return
            self._resume()

    def _ask(self) -> None:
        """Hand over what the guest has put into its queues and for which there are slots."""
        before = len(self._asked)
        for ring in self._guest.rings:
            if ring.kick < 0:
                continue
            for number, reading, writing in ring.messages(len(self._queue.free)):
                slot = self._queue.free[-1]
                length = self._guest.memory.gather(reading, self._queue.room(slot))
                self._queue.submit(slot, length, sum(each for _, each in writing))
                self._asked[slot] = Question(ring, ring.life, number, writing)
        if len(self._asked) > before:
            self._queue.kick()

    def _answer(self) -> None:
        answered = set()
        for slot, answer in self._queue.answers():
            question = self._asked.pop(slot)
            if question.ring.kick < 0:
                self._held.append((question, bytes(answer)))
            elif self._give(question, answer):
                answered.add(question.ring)
        for ring in answered:
            ring.interrupt()

    def _give(self, question: Question, answer: memoryview) -> bool:
        ring, life, number, writing = question
        if life != ring.life:
            return False
        self._guest.memory.scatter(answer, writing)
        ring.give_back(number, len(answer))
        return True

    def _resume(self) -> None:
        """Answer what was answered while its queue stood still, and see what has been asked."""
        held, self._held = self._held, []
        for question, answer in held:
            if question.ring.kick < 0:
                self._held.append((question, answer))
            elif self._give(question, memoryview(answer)):
                question.ring.interrupt()
        self._ask()


def main(argv: list[str]) -> None:
    """Becomes the server; a child of its copies, and ends with it as it does with QEMU. Raises OSError."""
    starter, listener, memory, log, mode, source, *server = argv
    program = virtiofs_exec.shut_in(source, read_only=mode == "ro", server=server[0])
    # Nobody else can have called: the queue of a backlog of 0 has one place.
    with socket.socket(socket.AF_UNIX) as waiting, socket.socket(socket.AF_UNIX) as ours:
        waiting.bind("")
        waiting.listen(0)
        ours.setblocking(False)
        ours.connect(waiting.getsockname())
        us = os.getpid()
        if os.fork() == 0:
            waiting.close()
            _child(us, ours, int(listener), int(memory), int(log))
        calls.die_with_parent()
        if os.getppid() != int(starter):  # it has gone already
            sys.exit("virtiofs: nobody is left to serve")
        calls.forgo(calls.SYS_PTRACE)  # or it could, whatever its child says
        problems = os.dup(2)
        os.dup2(int(log), 2)
        for fd in (listener, memory, log):
            os.close(int(fd))
        os.set_inheritable(waiting.fileno(), True)  # which is what dup2 does not do to itself
        os.dup2(waiting.fileno(), SERVER_FD)
        try:
            os.execve(program, server, dict(os.environ))
        except OSError as error:
            os.write(problems, f"{server[0]}: {error.strerror}\n".encode())
            raise


def _child(server: int, ours: socket.socket, listener: int, memory: int, log: int) -> None:
    """Live no longer than the server, and have no rights. Never returns."""
    code = 1
    try:
        # The server is the user too, in the same namespace, and speaks with the guest: it must not read our MEMORY.
        calls.hide()
        calls.die_with_parent()
        calls.keep_capabilities(())
        if os.getppid() == server:
            queue = vhost_user.Queue(ours, _REQUESTS, _SLOTS, _SLOT_BYTES)
            os.write(2, b"\0")
            os.dup2(log, 2)
            with socket.socket(fileno=listener) as waiting:
                waiting.settimeout(_CALL_TIMEOUT_S)
                qemu, _ = waiting.accept()
            qemu.settimeout(None)
            guest = vhost_guest.Guest(qemu, vhost_guest.Memory(memory))
            guest.rings += [vhost_guest.Ring(guest.memory) for _ in range(_QUEUES)]
            Copier(guest, queue).copy(ours)
            code = 0
    except (OSError, ValueError) as error:
        os.write(2, f"virtiofs: {error}\n".encode())
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
