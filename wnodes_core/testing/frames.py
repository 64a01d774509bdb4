"""Ethernet frames by hand, as a guest that means harm would write them; ``forbidden`` says which those are."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

BROADCAST = "ff:ff:ff:ff:ff:ff"
_FRAGMENT, _OPTIONS = 44, 60  # next-header numbers of IPv6 (RFC 8200, 4)
Tags = Sequence[tuple[int, int]]


def raw(mac: str) -> bytes:
    """The six bytes of a MAC."""
    return bytes.fromhex(mac.replace(":", ""))


def ether(source: str, target: str, kind: int, payload: bytes, *tags: tuple[int, int]) -> bytes:
    """An Ethernet frame; ``tags`` are (ethertype, VLAN) pairs, outer first."""
    head = b"".join(struct.pack("!HH", *tag) for tag in tags)
    return (raw(target) + raw(source) + head + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def snap(source: str, target: str, kind: int, payload: bytes) -> bytes:
    """The same in the words of IEEE 802.2: a length where the type would be, then LLC and SNAP."""
    body = b"\xaa\xaa\x03\0\0\0" + struct.pack("!H", kind) + payload
    return ether(source, target, len(body), body)


def arp(
    source: str,
    sender: str,
    wanted: str,
    *,
    operation: int = 1,
    says: str = "",
    target: str = BROADCAST,
    tags: Tags = (),
) -> bytes:
    """An ARP request or reply; ``says`` is the MAC in it if it is not the frame's."""
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation) + raw(says or source) + socket.inet_aton(sender)
    return ether(source, target, 0x806, body + bytes(6) + socket.inet_aton(wanted), *tags)


def ipv4(
    sender: str,
    receiver: str,
    protocol: int,
    payload: bytes,
    *,
    part: int = 0,
    more: bool = False,
    options: bytes = b"",
) -> bytes:
    """A packet, or the fragment of one that begins at byte ``part``."""
    size, place = 20 + len(options) + len(payload), part // 8 | more << 13
    ends = socket.inet_aton(sender) + socket.inet_aton(receiver)
    head = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, size, 7, place, 64, protocol, 0) + ends + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def datagram(ports: tuple[int, int], text: bytes = b"hello") -> bytes:
    """UDP's header and text, without a checksum."""
    return struct.pack("!HHHH", *ports, 8 + len(text), 0) + text


def udp(
    source: str,
    target: str,
    sender: str,
    receiver: str,
    *,
    ports: tuple[int, int] = (4000, 5000),
    tags: Tags = (),
    text: bytes = b"hello",
    options: bytes = b"",
) -> bytes:
    """A UDP datagram over IPv4."""
    return ether(source, target, 0x800, ipv4(sender, receiver, 17, datagram(ports, text), options=options), *tags)


def segment(sender: str, receiver: str, port: int, flags: int = 2) -> bytes:
    """TCP's header and no data: a SYN by default."""
    body = struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 0x50, flags, 1000, 0, 0)
    pseudo = socket.inet_aton(sender) + socket.inet_aton(receiver) + struct.pack("!BBH", 0, 6, len(body))
    return body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]


def tcp(source: str, target: str, sender: str, receiver: str, port: int, flags: int = 2) -> bytes:
    """A TCP segment over IPv4."""
    return ether(source, target, 0x800, ipv4(sender, receiver, 6, segment(sender, receiver, port, flags)))


def fragments(
    source: str, target: str, sender: str, receiver: str, protocol: int, payload: bytes, cut: int
) -> list[bytes]:
    """An IPv4 packet in two pieces, the first of ``cut`` bytes."""
    first = ipv4(sender, receiver, protocol, payload[:cut], more=True)
    rest = ipv4(sender, receiver, protocol, payload[cut:], part=cut)
    return [ether(source, target, 0x800, each) for each in (first, rest)]


def ping(source: str, target: str, sender: str, receiver: str) -> bytes:
    """An echo request over IPv4."""
    body = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"ping"
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return ether(source, target, 0x800, ipv4(sender, receiver, 1, body))


def icmp6(sender: str, receiver: str, kind: int, payload: bytes) -> bytes:
    """An ICMPv6 message with its checksum."""
    ends = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, receiver)
    body = struct.pack("!BBH", kind, 0, 0) + payload
    total = checksum(ends + struct.pack("!II", len(body), 58) + body)
    return body[:2] + struct.pack("!H", total) + body[4:]


def ipv6(
    source: str, target: str, sender: str, receiver: str, kind: int, payload: bytes, *, header: int = 58
) -> bytes:
    """An ICMPv6 message of a kind, or with another ``header`` any payload."""
    ends = socket.inet_pton(socket.AF_INET6, sender) + socket.inet_pton(socket.AF_INET6, receiver)
    body = icmp6(sender, receiver, kind, payload) if header == 58 else payload
    return ether(source, target, 0x86DD, struct.pack("!IHBB", 6 << 28, len(body), header, 255) + ends + body)


def fragments6(
    source: str, target: str, ends: tuple[str, str], payload: bytes, cut: int, *, header: int = 58, trailer: bytes = b""
) -> list[bytes]:
    """An IPv6 packet in two pieces; ``trailer`` lies behind the first one's end, where Ethernet pads."""
    found = []
    for at, piece in ((0, payload[:cut]), (cut, payload[cut:])):
        head = struct.pack("!BBHI", header, 0, at | (not at), 7)
        found.append(ipv6(source, target, *ends, 0, head + piece, header=_FRAGMENT))
    return [found[0][: 54 + 8 + cut] + trailer if trailer else found[0], found[1]]


def behind_options(payload: bytes, header: int = 58) -> bytes:
    """The payload of an IPv6 packet behind a header of destination options, 8 bytes of padding."""
    return bytes([header, 0, 1, 4, 0, 0, 0, 0]) + payload


def checksum(data: bytes) -> int:
    """The Internet's (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2))
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
        """Of a frame with or without tags; ``tag`` is the inner one's VLAN."""
        kind, tag, at = struct.unpack_from("!H", frame, 12)[0], 0, 14
        while kind in (0x8100, 0x88A8):
            tag, kind = struct.unpack_from("!HH", frame, at)
            at += 4
        return cls(frame[6:12].hex(":"), frame[:6].hex(":"), kind, tag & 0xFFF, frame[at:])


def came(taken: list[bytes], frame: bytes) -> bool:
    """Whether a frame is among those taken; a bridge may cut its padding off, a trunk adds a tag."""
    bare = [each[:12] + each[16:] if each[12:14] == b"\x81\0" and frame[12:14] != b"\x81\0" else each for each in taken]
    return any(len(each) > 40 and frame.startswith(each.rstrip(b"\0")) for each in bare)
