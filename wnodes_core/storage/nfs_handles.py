"""Which files an NFS gateway opens by their handles: those that lie in its share, seen from where they are now.

A file handle of NFS is the file system's own, and a hostile guest makes up what it likes: it could name any file of
that file system, also one below a folder that the job's user may not enter. Landlock lets the server open only what
lies beneath the share. But a handle names a file and not its place; the kernel knows the place as long as it has
the name in its cache. For a file whose name was forgotten Landlock says EACCES, which a job would see. So each
``open_by_handle_at`` of the server is first answered here: ESTALE for a file that is not seen in the share, and the
guest's kernel looks its name up again, which has the host's learn the place. Nothing is allowed here that Landlock
does not judge after. seccomp_unotify(2), open_by_handle_at(2); Linux 5.5.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from contextlib import suppress

_NUMBERS = {"x86_64": (0xC000003E, 304, 317), "aarch64": (0xC00000B7, 265, 277)}  # linux/audit.h, asm/unistd.h
_MODE_FILTER, _NEW_LISTENER = 1, 8  # linux/seccomp.h
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # _IOWR('!', 0, struct seccomp_notif), _IOWR('!', 1, seccomp_notif_resp)
_CONTINUE = 1
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ

_libc = ctypes.CDLL(None, use_errno=True)


def usable() -> str:
    """'' if this host can do it, else the reason why not."""
    machine = os.uname().machine
    return "" if machine in _NUMBERS else f"gateways cannot be confined on {machine}"


def listen() -> int:
    """From now on this process and its children ask, through the fd returned, before they open a handle.

    Raises OSError.
    """
    arch, wanted, seccomp = _NUMBERS[os.uname().machine]
    load, equal, give = 0x20, 0x15, 0x06  # linux/filter.h
    steps = ((load, 0, 0, 4), (equal, 0, 3, arch), (load, 0, 0, 0), (equal, 0, 1, wanted), (give, 0, 0, _NOTIFY))
    code = b"".join(struct.pack("=HBBI", *step) for step in (*steps, (give, 0, 0, _ALLOW)))
    text = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(text))  # struct sock_fprog
    found = int(_libc.syscall(ctypes.c_long(seccomp), _MODE_FILTER, _NEW_LISTENER, program))
    if found < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    return found


class Judge:
    """Who answers for one server, whose pid is ``child`` and whose folder is mounted at ``share``. Raises OSError."""

    def __init__(self, child: int, listener: int, share: str) -> None:
        self._ended = os.pidfd_open(child)
        self._listener = listener
        self._child = child
        self._memory = -1
        self._share = share
        self._mount = os.open(share, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def answer(self, seconds: float | None = None) -> None:
        """Answer what is asked until the server has ended, or at most one question within so long."""
        while True:
            ready, _, _ = select.select([self._listener, self._ended], [], [], seconds)
            if self._ended in ready:
                return
            if self._listener in ready:
                self._one()
            if seconds is not None:
                return

    def _one(self) -> None:
        asked = bytearray(80)
        with suppress(FileNotFoundError):  # who asked has gone
            fcntl.ioctl(self._listener, _RECEIVE, asked)
            number = struct.unpack_from("=Q", asked)[0]
            address = struct.unpack_from("=Q", asked, 16 + 16 + 8)[0]  # of the second argument
            code = self._code(address)
            fcntl.ioctl(self._listener, _SEND, struct.pack("=QqiI", number, 0, -code, 0 if code else _CONTINUE))

    def _code(self, address: int) -> int:
        """0 if the file is seen in the share, else the error that the server gets."""
        try:
            raw = self._read(address)
            count = min(struct.unpack_from("=I", raw)[0], _HANDLE_BYTES)
            fd = self._opened(raw[: 8 + count])
        except OSError as error:
            return error.errno or errno.ESTALE
        # Not kept open until the server has it, too: that would keep what is removed on the disk. Of all names this
        # one is the last that the kernel will forget.
        try:
            seen = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
        finally:
            os.close(fd)
        return 0 if seen == self._share or seen.startswith(self._share + "/") else errno.ESTALE

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
        text = ctypes.create_string_buffer(handle, len(handle))
        found = int(_libc.open_by_handle_at(self._mount, text, os.O_PATH | os.O_CLOEXEC))
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return found
