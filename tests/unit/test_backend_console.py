"""The console in messages, and its bound."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wnodes_core.backends.libvirt.console import boot_failure, bounded_console


def test_quotes_the_last_lines_indented(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_text("".join(f"line {n}\r\n" for n in range(100)))
    quoted = boot_failure(str(console)).splitlines()
    assert quoted[0] == "the console ends with:"
    assert quoted[1:] == [f"  | line {n}" for n in range(88, 100)]


def test_no_control_character_survives(tmp_path: Path) -> None:
    console = tmp_path / "console"
    everything = b"".join(b"a" + bytes((code,)) + b"z\n" for code in range(256) if code != 10)
    console.write_bytes(everything + b"\x1b[2J\x1b]0;title\x07\x1b[31mred\x1b[0m\xc2\x9b31m\xe2\x80\xaeevil\n")
    for character in boot_failure(str(console)):
        assert character == "\n" or character.isprintable()
    assert boot_failure(str(console)).endswith("  | red 31m evil")


def test_one_endless_line_is_cut(tmp_path: Path) -> None:
    console = tmp_path / "console"
    console.write_bytes(b"x" * 100_000)
    assert len(boot_failure(str(console))) < 300


@pytest.mark.parametrize("content", [None, b"", b"\r\n\r\n \x1b[0m\n"])
def test_silence_is_told_as_silence(tmp_path: Path, content: bytes | None) -> None:
    console = tmp_path / "console"
    if content is not None:
        console.write_bytes(content)
    assert boot_failure(str(console)) == "the console is empty"


def test_bound_keeps_the_end_and_a_writer_that_appends_goes_on(tmp_path: Path) -> None:
    console = tmp_path / "console"
    writer = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(writer, b"old\n" * 1024 + b"newest\n")
    assert bounded_console(str(console), 4)
    os.write(writer, b"after\n")
    os.close(writer)
    data = console.read_bytes()
    assert data.startswith(b"[... cut by wnodes ...]\n")
    assert data.endswith(b"old\nnewest\nafter\n")
    assert len(data) < 2200


def test_bound_leaves_the_small_the_missing_and_links_alone(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 5000)
    link = tmp_path / "link"
    link.symlink_to(big)
    assert not bounded_console(str(big), 5)
    assert not bounded_console(str(link), 1)
    assert not bounded_console(str(tmp_path / "none"), 1)
    assert big.stat().st_size == 5000
