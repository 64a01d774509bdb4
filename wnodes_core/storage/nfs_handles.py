"""Opens for an NFS gateway what clients name by file handles, if it lies in the share.

A file handle of NFS is the file system's own, and a hostile guest makes up what it likes: it could name any file of
that file system, also one below a folder that the job's user may not enter. Landlock is no answer: a handle names a
file and not its place, and what Linux says of a file that was reached past its mount has changed (*measured*: 6.18
takes it for the mount's own; by another mount it refuses also files of the share whose names it has forgotten). So
the server opens no handle: seccomp brings each ``open_by_handle_at`` here, and what is seen in the share is opened
and handed over (or let pass, where it is opened only to be looked at). All else is ESTALE, and for a file of the
share whose name was forgotten that is right, too: the guest's kernel looks the name up again, and so the host's
learns it. The share is mounted at a place with a name that nobody can guess, for a path that leads past a mount is
told from the file system's own root. seccomp_unotify(2), open_by_handle_at(2); Linux 5.14.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct

from wnodes_core.storage import calls

_NUMBERS = {"x86_64": (304, 317), "aarch64": (265, 277)}  # open_by_handle_at, seccomp: asm/unistd.h
_MODE_FILTER, _NEW_LISTENER = 1, 8  # linux/seccomp.h
_NOTIFY = 0x7FC00000  # SECCOMP_RET_USER_NOTIF
# _IOWR('!', 0, seccomp_notif), _IOWR('!', 1, seccomp_notif_resp), _IOW('!', 3, seccomp_notif_addfd)
_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0x40182103
_ADD_AND_SEND, _CONTINUE = 2, 1
# Of struct seccomp_notif the question's number and the second and third argument of the call.
_ASKED = struct.Struct("=Q32xQQ")
_ADDED, _ANSWER = struct.Struct("=QIIII"), struct.Struct("=QqiI")  # struct seccomp_notif_addfd, seccomp_notif_resp
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ


def usable() -> str:
    """'' if this host can do it, else the reason why not."""
    machine = os.uname().machine
    return "" if machine in _NUMBERS else f"gateways cannot be confined on {machine}"


def listen() -> int:
    """From now on this process and its children ask, through the fd returned, before they open a handle.

    Raises OSError.
    """
    wanted, seccomp = _NUMBERS[os.uname().machine]
    program, kept = calls.filter_of(wanted, _NOTIFY)
    listener = calls.call(seccomp, _MODE_FILTER, _NEW_LISTENER, program)
    del kept  # until now the filter lay in it
    return listener


class Opener:
    """Who opens for one server, whose pid is ``child``; its folder is mounted at ``share``. Raises OSError."""

    def __init__(self, child: int, listener: int, share: str) -> None:
        self.share = share
        self._ended = os.pidfd_open(child)
        self._listener = listener
        self._child = child
        self._memory = -1
        self._mount = os.open(share, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fds = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._poll = select.poll()
        for fd in (listener, self._ended):
            self._poll.register(fd, select.POLLIN)

    def answer(self, seconds: float | None = None) -> None:
        """Answer what is asked until the server has ended, or at most one question within so long."""
        while True:
            ready = self._poll.poll(None if seconds is None else seconds * 1000)
            if any(fd == self._ended for fd, _ in ready):
                return
            if ready:
                self._one()
            if seconds is not None:
                return

    def _one(self) -> None:
        asked = bytearray(80)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, asked)
            number, address, flags = _ASKED.unpack_from(asked)
            try:
                self._hand_over(number, address, flags & 0xFFFFFFFF)
            except OSError as error:  # also if the server has too many files open: that is its client's error alone
                self._say(number, -(error.errno or errno.ESTALE), 0)
        except FileNotFoundError:
            pass  # who asked has gone

    def _hand_over(self, number: int, address: int, flags: int) -> None:
        """Answer a question, unless it is refused. Raises OSError."""
        fd = self._found(address, flags)
        if fd < 0:
            self._say(number, 0, _CONTINUE)
            return
        try:
            fcntl.ioctl(self._listener, _ADD_FD, _ADDED.pack(number, _ADD_AND_SEND, fd, 0, flags & os.O_CLOEXEC))
        finally:
            os.close(fd)

    def _say(self, number: int, result: int, more: int) -> None:
        fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(number, 0, result, more))

    def _found(self, address: int, flags: int) -> int:
        """A file of the share, open as the server wants it, or -1: it may open it itself. Raises OSError for others."""
        raw = self._read(address)
        fd = self._opened(raw[: 8 + min(struct.unpack_from("=I", raw)[0], _HANDLE_BYTES)])
        try:
            seen = os.readlink(str(fd), dir_fd=self._fds)
            if seen.removesuffix(" (deleted)") != self.share and not seen.startswith(self.share + "/"):
                raise OSError(errno.ESTALE, "not in the share")
            if flags & os.O_PATH:  # not to be handed over (EBADF), and neither to be read nor written
                return -1
            # As root, as the server would: it has judged the user's right. Nobody waits here for a FIFO's other end.
            how = flags & ~os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(str(fd), how, dir_fd=self._fds)
        finally:
            os.close(fd)

    def _read(self, address: int) -> bytes:
        """What the server has in its memory there; an fd from before its exec has another's."""
        raw = os.pread(self._memory, 8 + _HANDLE_BYTES, address) if self._memory >= 0 else b""
        if len(raw) < 8:
            if self._memory >= 0:
                os.close(self._memory)
            self._memory = os.open(f"/proc/{self._child}/mem", os.O_RDONLY | os.O_CLOEXEC)
            raw = os.pread(self._memory, 8 + _HANDLE_BYTES, address)
        if len(raw) < 8:
            raise OSError(errno.EFAULT, "no handle there")
        return raw

    def _opened(self, handle: bytes) -> int:
        return calls.checked(calls.libc.open_by_handle_at(self._mount, handle, os.O_PATH | os.O_CLOEXEC))
