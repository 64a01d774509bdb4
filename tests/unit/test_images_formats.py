"""What may enter the store as a disk. The images are made by the real qemu-img."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from wnodes_core.errors import BadFormat, LibvirtDown
from wnodes_core.images import formats


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    qemu_img("create", "-f", "qcow2", tmp_path / "disk", "64M")
    return tmp_path / "disk"


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_ordinary_disks(disk: Path, tmp_path: Path) -> None:
    formats.check(disk, "qcow2")
    assert formats.detect(disk) == "qcow2"
    for options in ("compat=0.10", "extended_l2=on", "compression_type=zstd", "cluster_size=2M"):
        qemu_img("create", "-f", "qcow2", "-o", options, tmp_path / "other", "10G")
        formats.check(tmp_path / "other", "qcow2")
    (tmp_path / "raw").write_bytes(bytes(1024))
    formats.check(tmp_path / "raw", "raw")


def test_a_backing_file_is_refused(disk: Path, tmp_path: Path) -> None:
    qemu_img("create", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", tmp_path / "evil", "1M")
    with pytest.raises(BadFormat, match="backing file"):
        formats.check(tmp_path / "evil", "qcow2")


def test_an_external_data_file_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "evil", "1M")
    with pytest.raises(BadFormat, match="external data file"):
        formats.check(tmp_path / "evil", "qcow2")


def test_a_data_file_name_without_its_flag_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "evil", "1M")
    patch(tmp_path / "evil", 72, bytes(8))
    with pytest.raises(BadFormat, match="external data file"):
        formats.check(tmp_path / "evil", "qcow2")


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (4, struct.pack(">I", 9), "version 9"),
        (20, struct.pack(">I", 63), "cluster size"),
        (24, struct.pack(">Q", 1 << 60), "virtual size"),
        (24, struct.pack(">Q", 0), "virtual size"),
        (32, struct.pack(">I", 1), "encrypted"),
        (36, struct.pack(">I", 1 << 31), "first-level table"),
        (72, struct.pack(">Q", 2), "corrupt"),
        (72, struct.pack(">Q", 1 << 40), "unknown features"),
        (40, struct.pack(">Q", 3), "refused by qemu-img"),
    ],
)
def test_odd_headers_are_refused(disk: Path, offset: int, data: bytes, said: str) -> None:
    patch(disk, offset, data)
    with pytest.raises(BadFormat, match=said):
        formats.check(disk, "qcow2")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\xfd7zXZ\0rest", "xz-compressed"),
        (b"\x1f\x8b\x08", "gzip-compressed"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"KDMV", "VMDK"),
        (b"QFI\xfb", "qcow2 disk"),
    ],
)
def test_a_raw_disk_that_is_something_else(head: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(head.ljust(512, b"\0"))
    with pytest.raises(BadFormat, match=said):
        formats.check(tmp_path / "x", "raw")


@pytest.mark.parametrize("size", [0, 511, 513])
def test_a_raw_disk_of_odd_size(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(BadFormat, match=f"raw disk of {size} bytes"):
        formats.check(tmp_path / "x", "raw")


@pytest.mark.parametrize("text", [b"", b"QFI\xfb", b"not a disk" * 100])
def test_what_is_no_qcow2(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(BadFormat):
        formats.check(tmp_path / "x", "qcow2")


def test_raw_is_never_guessed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(512))
    with pytest.raises(BadFormat, match="say that the format is raw"):
        formats.detect(tmp_path / "x")


def test_a_missing_qemu_img_is_the_hosts_fault(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats.command, "PATH", "/nonexistent")
    monkeypatch.setattr(formats, "_LIMITS", ())
    with pytest.raises(LibvirtDown, match="qemu-img is missing"):
        formats.check(disk, "qcow2")
