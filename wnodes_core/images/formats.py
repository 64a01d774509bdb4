"""Telling good disk images from bad: no backing file, no external data, no absurd size.

A qcow2 file may name other files, which QEMU would open for it: whoever could bring such an
image could read the host's files. So we read the header ourselves before any other program
sees the file, and let qemu-img, with limits, have the second word.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from wnodes_core import command
from wnodes_core.errors import BadFormat, CommandError, LibvirtDown

MAX_VIRTUAL_BYTES = 16 << 40
_QCOW2 = b"QFI\xfb"
_MAGICS = {
    b"\xfd7zXZ\0": "xz-compressed file",
    b"\x1f\x8b": "gzip-compressed file",
    b"\x28\xb5\x2f\xfd": "zstd-compressed file",
    b"BZh": "bzip2-compressed file",
    b"PK\x03\x04": "zip file",
    b"KDMV": "VMDK disk",
    b"# Disk DescriptorFile": "VMDK descriptor",
    b"vhdxfile": "VHDX disk",
    b"conectix": "VHD disk",
    b"<<< ": "VDI disk",
    b"QED\0": "QED disk",
    b"LUKS\xba\xbe": "LUKS volume",
    b"<": "HTML or XML page",
}
# qcow2.txt of QEMU, "incompatible_features": dirty, corrupt, external data, compression type, extended L2
_CORRUPT, _EXTERNAL, _KNOWN_FEATURES = 1 << 1, 1 << 2, 0b11001
_DATA_FILE_EXTENSION = 0x44415441
_LIMITS = ("prlimit", "--as=1073741824", "--cpu=20", "--")


def detect(path: Path) -> str:
    """``qcow2`` for such a file; a raw disk has no sign of its own. Raises BadFormat."""
    head = _head(path)
    if head.startswith(_QCOW2):
        return "qcow2"
    raise BadFormat(f"{_what(head)}: want qcow2, or say that the format is raw")


def check(path: Path, wanted: str) -> None:
    """Make sure that a file is a self-contained disk of the format that the catalogue says.

    Raises BadFormat, and LibvirtDown when qemu-img is missing.
    """
    head = _head(path)
    if wanted == "qcow2":
        _check_header(head)
        _check_with_qemu(path)
        return
    size = os.stat(path).st_size
    if head.startswith(_QCOW2) or _what(head) != "no known format":
        raise BadFormat(f"the catalogue says raw, the file is a {_what(head)}")
    if size == 0 or size % 512 or size > MAX_VIRTUAL_BYTES:
        raise BadFormat(f"raw disk of {size} bytes: want a multiple of 512 up to {MAX_VIRTUAL_BYTES}")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _what(head: bytes) -> str:
    if head.startswith(_QCOW2):
        return "qcow2 disk"
    return next((what for magic, what in _MAGICS.items() if head.startswith(magic)), "no known format")


def _check_header(head: bytes) -> None:
    if not head.startswith(_QCOW2) or len(head) < 104:
        raise BadFormat(f"the catalogue says qcow2, the file has {_what(head)}")
    version, backing, _, cluster_bits, size, crypt, l1_entries = struct.unpack(">IQIIQII", head[4:40])
    features, header_length = 0, 72
    if version == 3:
        features, header_length = struct.unpack(">Q", head[72:80])[0], struct.unpack(">I", head[100:104])[0]
    problems = (
        (version not in (2, 3), f"version {version}: want 2 or 3"),
        (backing, "it names a backing file, which could be any file of the host"),
        (features & _EXTERNAL, "it names an external data file, which could be any file of the host"),
        (features & _CORRUPT, "it is marked corrupt"),
        (features & ~_KNOWN_FEATURES & ~_EXTERNAL & ~_CORRUPT, f"unknown features {features:#x}"),
        (crypt, "it is encrypted"),
        (not 9 <= cluster_bits <= 21, f"cluster size 2^{cluster_bits}: want 2^9 to 2^21"),
        (not 0 < size <= MAX_VIRTUAL_BYTES, f"virtual size {size}: want up to {MAX_VIRTUAL_BYTES}"),
        (l1_entries > 4 << 20, f"{l1_entries} entries in its first-level table"),
        (_DATA_FILE_EXTENSION in _extensions(head, header_length), "it names an external data file"),
    )
    for bad, problem in problems:
        if bad:
            raise BadFormat(f"qcow2 refused: {problem}")


def _extensions(head: bytes, offset: int) -> list[int]:
    kinds = []
    while offset + 8 <= len(head):
        kind, length = struct.unpack(">II", head[offset : offset + 8])
        if kind == 0:
            break
        kinds.append(kind)
        offset += 8 + -(-length // 8) * 8
    return kinds


def _check_with_qemu(path: Path) -> None:
    argv = [*_LIMITS, "qemu-img", "info", "--force-share", "--output=json", "-f", "qcow2", str(path)]
    try:
        info: dict[str, Any] = json.loads(command.run(argv, timeout_s=60).stdout)
    except CommandError as error:
        if error.exit_code in (126, 127):
            raise LibvirtDown("qemu-img is missing", hint="install the package qemu-utils") from error
        raise BadFormat(f"qcow2 refused by qemu-img: {error.stderr_tail.strip()[-300:]}") from error
    specific = dict(info.get("format-specific", {}).get("data", {}))
    if "backing-filename" in info or "full-backing-filename" in info or "data-file" in specific:
        raise BadFormat("qcow2 refused: it names another file")
    if info.get("encrypted") or not 0 < int(info["virtual-size"]) <= MAX_VIRTUAL_BYTES:
        raise BadFormat("qcow2 refused: encrypted, or of an absurd size")
