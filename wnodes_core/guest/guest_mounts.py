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
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 32, 4096  # mount(2)


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


def mounts_at(text: bytes, target: bytes) -> list[str]:
    """The devices (``0:31``) of what is mounted at ``target``, one upon the other (proc(5), mountinfo)."""
    octal = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in target)
    lines = [line.split() for line in text.splitlines()]
    return [words[2].decode("ascii") for words in lines if words[4] == octal]


def read_ahead(device: str, kib: int) -> None:
    """Have the kernel read so far ahead; where it cannot be told so, reading is only slower."""
    try:
        with open("/sys/class/bdi/%s/read_ahead_kb" % device, "w") as file:
            file.write(str(kib))
    except OSError:
        pass


def bind(source: str, target: str, read_only: bool) -> None:
    """Show what is mounted at ``source`` at ``target`` too. Raises OSError."""
    if not _bind_by_call(os.fsencode(source), os.fsencode(target), read_only):
        _bind_by_program(source, target, read_only)


def _bind_by_call(source: bytes, target: bytes, read_only: bool) -> bool:
    """mount(2) through the half of ctypes that is in C: 15 ms under TCG, where all of ctypes takes 55, mount(8) 80."""
    try:
        import _ctypes

        ourselves = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]
        mount = _ctypes.dlsym(ourselves, "mount")
        steps = [_MS_BIND] + ([_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV] if read_only else [])
        return not any(_ctypes.call_function(mount, (source, target, None, flags, None)) for flags in steps)
    except Exception:  # noqa: BLE001 - python3-minimal has none, and nobody promised us its functions
        return False


def _bind_by_program(source: str, target: str, read_only: bool) -> None:
    argv = ["mount", "-o", "bind,ro" if read_only else "bind", source, target]
    pid = os.fork()
    if pid == 0:
        try:
            os.execvp(argv[0], argv)
        finally:
            os._exit(127)
    if os.waitpid(pid, 0)[1]:
        raise OSError(5, "cannot be mounted upon", target)


class Awaited:
    """One more file system at ``stage``, a folder that is made if need be, which is then shown at ``target``.

    The job sees a bind of it, because sshfs takes its own mount away when its server dies: the
    job would go on, into an empty folder of the guest. The bind stays and answers ENOTCONN.
    ``fd`` is readable when the mounts change. ``read_ahead_kib`` 0 leaves it at the kernel's own.
    """

    def __init__(self, stage: str, target: str, read_only: bool, read_ahead_kib: int = 0) -> None:
        os.makedirs(os.path.dirname(stage), 0o700, exist_ok=True)
        os.makedirs(stage, exist_ok=True)
        os.makedirs(target, exist_ok=True)
        self._stage, self._target, self._read_only = os.path.realpath(stage), target, read_only
        self._mountinfo = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        # The kernel tells a change as an exception; the agent's poll waits for readers only.
        self._changed = select.epoll()
        self._changed.register(self._mountinfo, select.EPOLLPRI)
        self.fd = self._changed.fileno()
        self._read_ahead_kib = read_ahead_kib
        self._before = len(self._devices())

    def there(self) -> bool:
        """Whether it is mounted by now."""
        return len(self._devices()) > self._before

    def show(self) -> str:
        """Show it at the target: '' or why that cannot be done."""
        devices = self._devices()
        if len(devices) <= self._before:
            return "it ended and left nothing mounted"
        try:
            os.statvfs(self._stage)  # its first answer: it works, and its greeting can no longer undo the next line
            if self._read_ahead_kib:
                read_ahead(devices[-1], self._read_ahead_kib)
            bind(self._stage, self._target, self._read_only)
        except OSError as error:
            return "%s: %s" % (self._target, error.strerror)
        return ""

    def _devices(self) -> list[str]:
        os.lseek(self._mountinfo, 0, os.SEEK_SET)
        text = b""
        while True:
            data = os.read(self._mountinfo, 64 << 10)
            if not data:
                return mounts_at(text, os.fsencode(self._stage))
            text += data

    def close(self) -> None:
        """Let go of the fds."""
        self._changed.close()
        os.close(self._mountinfo)
