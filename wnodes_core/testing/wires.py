"""Wires for tests: network namespaces without names, veth pairs, taps whose guest is the test.

A namespace lives as long as its descriptor, so a test that dies leaves nothing. Frames by hand: ``frames``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wnodes_core.tools import run

_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
_LIBC = ctypes.CDLL(None, use_errno=True)
_SOL_PACKET, _PACKET_AUXDATA, _VLAN_VALID = 263, 8, 0x10
QUIET_S = 0.15  # long enough for a frame to cross three bridges, on a busy machine too


class Namespace:
    """A network namespace; ``run`` calls a function in it, ``sh`` a program."""

    def __init__(self) -> None:
        self.fd = -1
        self._thread(self._make)
        self.sh("ip", "link", "set", "lo", "up")

    def _make(self) -> None:
        _check(_LIBC.unshare(_NEWNET))
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """A name of it, for ``ip link`` and nsenter(1)."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function there."""

        def there() -> Any:
            _check(_LIBC.setns(self.fd, _NEWNET))
            return function(*args, **kwargs)

        return self._thread(there)

    def sh(self, *argv: str, check: bool = True) -> str:
        """What a program prints there; with ``check`` it must succeed."""
        done = self.run(run, argv, check=False)
        assert not check or done.exit_code == 0, (argv, done.stderr)
        return str(done.text)

    def quiet(self, *devices: str) -> None:
        """No IPv6 of the kernel's own on these: it would speak up at moments of its own choice."""
        self.sh("sysctl", "-qw", *(f"net.ipv6.conf.{device}.disable_ipv6=1" for device in devices))

    def close(self) -> None:
        """It is gone with the last process in it."""
        os.close(self.fd)

    @staticmethod
    def _thread(function: Callable[[], Any]) -> Any:
        box: list[Any] = []

        def body() -> None:
            try:
                box.append((function(), None))
            except BaseException as error:  # noqa: BLE001 - carried over to the caller
                box.append((None, error))

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        result, error = box[0]
        if error is not None:
            raise error
        return result


@contextmanager
def inside(space: Namespace) -> Iterator[None]:
    """Within the block this very thread, and whatever it starts, lives in the namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_LIBC.setns(space.fd, _NEWNET))
        yield
    finally:
        _check(_LIBC.setns(before, _NEWNET))
        os.close(before)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def veth(one: Namespace, name: str, other: Namespace, peer: str) -> None:
    """A cable between two namespaces, without addresses."""
    one.sh("ip", "link", "add", name, "type", "veth", "peer", "name", peer, "netns", other.path)
    one.sh("ip", "link", "set", name, "addrgenmode", "none", "up")
    other.sh("ip", "link", "set", peer, "addrgenmode", "none", "up")


class Tap:
    """The guest's end of a lease's tap: whatever is written here a guest has sent."""

    def __init__(self, node: Namespace, device: str) -> None:
        self.fd = node.run(self._open, device)

    @staticmethod
    def _open(device: str) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI))
        return fd

    def send(self, frame: bytes) -> None:
        """As the guest."""
        os.write(self.fd, frame)

    def frames(self, quiet_s: float = QUIET_S) -> list[bytes]:
        """What has come for the guest, until nothing comes any more."""
        return _drain(self.fd, lambda: os.read(self.fd, 65536), quiet_s)

    def close(self) -> None:
        """As QEMU does when it ends."""
        os.close(self.fd)


class Wiretap:
    """All that passes a device, as tcpdump would see it."""

    def __init__(self, where: Namespace, device: str) -> None:
        self.socket = where.run(self._open, device)

    @staticmethod
    def _open(device: str) -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        made.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        made.bind((device, 3))
        return made

    def send(self, frame: bytes) -> None:
        """From this device."""
        self.socket.send(frame)

    def frames(self, quiet_s: float = QUIET_S) -> list[bytes]:
        """What has passed since, until nothing passes any more."""
        return _drain(self.socket.fileno(), self._frame, quiet_s)

    def _frame(self) -> bytes:
        """The next frame, with the tag that the kernel has taken out of it and put beside it (packet(7))."""
        beside: list[tuple[int, int, bytes]]
        frame: bytes
        frame, beside, _, _ = self.socket.recvmsg(65536, 64)
        for level, kind, data in beside:
            if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
                status, _, _, _, _, tag, ethertype = struct.unpack_from("=IIIHHHH", data)
                if status & _VLAN_VALID:
                    frame = frame[:12] + struct.pack("!HH", ethertype or 0x8100, tag) + frame[12:]
        return frame

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


def _drain(fd: int, read: Callable[[], bytes], quiet_s: float) -> list[bytes]:
    found, end = [], time.monotonic() + 5
    while select.select([fd], [], [], quiet_s)[0] and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            found.append(read())
    return found
