"""The node's network devices, asked of the kernel in one message: a millisecond, no program started."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
_GETLINK, _NEWLINK, _DONE, _ERROR = 18, 16, 3, 2
_REQUEST_DUMP = 0x1 | 0x300
_ADDRESS, _IFNAME, _MASTER, _LINKINFO, _IFALIAS, _KIND = 1, 3, 10, 18, 20, 1
_NESTED = 0x8000


@dataclass(frozen=True)
class Link:
    """One device. ``master`` is the name of the bridge that it is a port of, ``kind`` as in ``ip -d link``."""

    name: str
    index: int
    master: str
    alias: str
    kind: str
    mac: str


def links() -> dict[str, Link]:
    """The devices of this thread's network namespace, by name. Raises OSError."""
    found = list(_dump())
    names = {index: _text(told.get(_IFNAME, b"")) for index, told in found}
    return {link.name: link for link in (_link(index, told, names) for index, told in found)}


def _link(index: int, told: dict[int, bytes], names: dict[int, str]) -> Link:
    master = struct.unpack("=I", told[_MASTER])[0] if _MASTER in told else 0
    kind = attributes(told.get(_LINKINFO, b"")).get(_KIND, b"")
    mac = ":".join(f"{byte:02x}" for byte in told.get(_ADDRESS, b""))
    return Link(names[index], index, names.get(master, ""), _text(told.get(_IFALIAS, b"")), _text(kind), mac)


def _dump() -> Iterator[tuple[int, dict[int, bytes]]]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asked:
        asked.send(struct.pack("=IHHIIBxHiII", 32, _GETLINK, _REQUEST_DUMP, 1, 0, 0, 0, 0, 0, 0))
        while True:
            for kind, body in messages(asked.recv(1 << 18)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "the kernel does not list its network devices")
                if kind == _NEWLINK:
                    yield struct.unpack_from("=BxHi", body)[2], attributes(body[16:])


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages of netlink in what was received: type, body."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        yield kind, data[16:length]
        data = data[(length + 3) & ~3 :]


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message by their numbers."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & ~_NESTED] = data[4:length]
        data = data[max(4, (length + 3) & ~3) :]
    return found


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
