"""Wires for tests: network namespaces without names, veth pairs, taps whose guest is the test, frames by hand.

A namespace lives as long as its descriptor, so a test that dies leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
_LIBC = ctypes.CDLL(None, use_errno=True)
_SOL_PACKET, _PACKET_AUXDATA, _VLAN_VALID = 263, 8, 0x10
BROADCAST = "ff:ff:ff:ff:ff:ff"
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
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def there() -> Any:
            _check(_LIBC.setns(self.fd, _NEWNET))
            return function(*args, **kwargs)

        return self._thread(there)

    def sh(self, *argv: str, check: bool = True) -> str:
        done = self.run(subprocess.run, argv, capture_output=True, text=True)
        assert not check or done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def quiet(self, *devices: str) -> None:
        """No IPv6 of the kernel's own on these: it would speak up at moments of its own choice."""
        self.sh("sysctl", "-qw", *(f"net.ipv6.conf.{device}.disable_ipv6=1" for device in devices))

    def close(self) -> None:
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

    def __init__(self, node: Namespace, device: str, mac: str, uid: int = 0) -> None:
        self.mac = mac
        self.fd = node.run(self._open, device)

    @staticmethod
    def _open(device: str) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TAP | _IFF_NO_PI))
        return fd

    def send(self, frame: bytes) -> None:
        os.write(self.fd, frame)

    def frames(self, quiet_s: float = QUIET_S) -> list[bytes]:
        """What has come for the guest, until nothing comes any more."""
        return _drain(self.fd, lambda: os.read(self.fd, 65536), quiet_s)

    def close(self) -> None:
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
        self.socket.send(frame)

    def frames(self, quiet_s: float = QUIET_S) -> list[bytes]:
        return _drain(self.socket.fileno(), self._frame, quiet_s)

    def _frame(self) -> bytes:
        """The next frame, with the tag that the kernel has taken out of it and put beside it (packet(7))."""
        frame, beside, _, _ = self.socket.recvmsg(65536, 64)
        for level, kind, data in beside:
            if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
                status, _, _, _, _, tag, ethertype = struct.unpack_from("=IIIHHHH", data)
                if status & _VLAN_VALID:
                    frame = frame[:12] + struct.pack("!HH", ethertype or 0x8100, tag) + frame[12:]
        return frame

    def close(self) -> None:
        self.socket.close()


def _drain(fd: int, read: Callable[[], bytes], quiet_s: float) -> list[bytes]:
    found, end = [], time.monotonic() + 5
    while select.select([fd], [], [], quiet_s)[0] and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            found.append(read())
    return found


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ether(source: str, target: str, kind: int, payload: bytes, *tags: tuple[int, int]) -> bytes:
    """An Ethernet frame; ``tags`` are (ethertype, VLAN) pairs, outer first."""
    head = b"".join(struct.pack("!HH", *tag) for tag in tags)
    return (raw(target) + raw(source) + head + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def arp(source: str, sender: str, wanted: str, *, operation: int = 1, says: str = "", target: str = BROADCAST, tags: Any = ()) -> bytes:
    """An ARP request or reply; ``says`` is the MAC in it if it is not the frame's."""
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation) + raw(says or source) + socket.inet_aton(sender)
    return ether(source, target, 0x806, body + bytes(6) + socket.inet_aton(wanted), *tags)


def ipv4(sender: str, receiver: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0, socket.inet_aton(sender), socket.inet_aton(receiver))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(source: str, target: str, sender: str, receiver: str, *, ports: tuple[int, int] = (4000, 5000), tags: Any = (), text: bytes = b"hello") -> bytes:
    body = struct.pack("!HHHH", *ports, 8 + len(text), 0) + text
    return ether(source, target, 0x800, ipv4(sender, receiver, 17, body), *tags)


def tcp(source: str, target: str, sender: str, receiver: str, port: int, flags: int = 2) -> bytes:
    body = struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 0x50, flags, 1000, 0, 0)
    pseudo = socket.inet_aton(sender) + socket.inet_aton(receiver) + struct.pack("!BBH", 0, 6, len(body))
    body = body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]
    return ether(source, target, 0x800, ipv4(sender, receiver, 6, body))


def ping(source: str, target: str, sender: str, receiver: str) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"ping"
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return ether(source, target, 0x800, ipv4(sender, receiver, 1, body))


def ipv6(source: str, target: str, sender: str, receiver: str, kind: int, payload: bytes, *, header: int = 58) -> bytes:
    """An ICMPv6 message of a kind, or with another ``header`` any payload."""
    ends = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, receiver)
    body = payload
    if header == 58:
        body = struct.pack("!BBH", kind, 0, 0) + payload
        total = checksum(ends + struct.pack("!II", len(body), 58) + body)
        body = body[:2] + struct.pack("!H", total) + body[4:]
    return ether(source, target, 0x86DD, struct.pack("!IHBB", 6 << 28, len(body), header, 255) + ends + body)


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


@dataclass
class Seen:
    """A frame taken apart as far as tests look."""

    source: str
    target: str
    kind: int
    tag: int
    body: bytes

    @classmethod
    def of(cls, frame: bytes) -> Seen:
        kind, tag, at = struct.unpack_from("!H", frame, 12)[0], 0, 14
        while kind in (0x8100, 0x88A8):
            tag, kind = struct.unpack_from("!HH", frame, at)
            at += 4
        return cls(frame[6:12].hex(":"), frame[:6].hex(":"), kind, tag & 0xFFF, frame[at:])
