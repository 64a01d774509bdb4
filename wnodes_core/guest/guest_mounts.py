"""A command whose work is a mount: its port for stdio, and how we see that the mount is there.

Part of the agent (see ``bundle``), which waits for it itself: a helper program in Python cost an
emulated guest 0.3 s a mount, of 0.4 (``sshfs`` takes 0.06 of them).
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import os
import select

_PORTS = "/sys/class/virtio-ports"
_MOUNTINFO = "/proc/self/mountinfo"


def open_port(name: str) -> int:
    """Open a virtio-serial port by the name that the host gave it. Raises OSError."""
    for port in os.listdir(_PORTS):
        try:
            with open("%s/%s/name" % (_PORTS, port)) as file:
                if file.read().strip() == name:
                    return os.open("/dev/" + port, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
    raise FileNotFoundError(2, "no such virtio-serial port", name)


def mounts_at(text: bytes, target: bytes) -> int:
    """How many file systems are mounted at ``target``, one upon the other (proc(5), mountinfo)."""
    octal = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in target)
    return sum(line.split()[4] == octal for line in text.splitlines())


class Awaited:
    """One more file system at ``target``, a folder that is made if need be.

    ``fd`` is readable when the mounts change.
    """

    def __init__(self, target: str) -> None:
        os.makedirs(target, exist_ok=True)
        self._target = os.fsencode(os.path.realpath(target))
        self._mountinfo = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        # The kernel tells a change as an exception; the agent's poll waits for readers only.
        self._changed = select.epoll()
        self._changed.register(self._mountinfo, select.EPOLLPRI)
        self.fd = self._changed.fileno()
        self._before = self._count()

    def there(self) -> bool:
        """Whether it is mounted by now."""
        return self._count() > self._before

    def _count(self) -> int:
        os.lseek(self._mountinfo, 0, os.SEEK_SET)
        text = b""
        while True:
            data = os.read(self._mountinfo, 64 << 10)
            if not data:
                return mounts_at(text, self._target)
            text += data

    def close(self) -> None:
        """Let go of the fds."""
        self._changed.close()
        os.close(self._mountinfo)
