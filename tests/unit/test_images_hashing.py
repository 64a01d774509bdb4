"""Hashing a file while it is written."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from wnodes_core.images import hashing
from wnodes_core.images.hashing import Follower, digest_of


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_WINDOW", 1 << 16)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_writing_and_announcing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(1_000_000)
    follower, at = Follower(tmp_path / "x"), 0
    with open(tmp_path / "x", "wb", buffering=0) as file:
        while at < len(data):
            step = chance.choice([1, 100, 4096, 65536, 100_000])
            file.write(data[at : at + step])
            at = min(len(data), at + step)
            if chance.random() < 0.7:
                follower.announce(at)
    assert follower.finish() == sha(data) == digest_of(tmp_path / "x")


def test_starting_over_again_and_again_cuts_no_map_away(tmp_path: Path) -> None:
    old, data = os.urandom(2_000_000), os.urandom(500_000)
    follower = Follower(tmp_path / "x")
    for _ in range(50):
        (tmp_path / "x").write_bytes(old)
        follower.announce(len(old))
        follower.announce(0)
        os.truncate(tmp_path / "x", 0)  # under a live map the next read would be a SIGBUS
    (tmp_path / "x").write_bytes(data)
    assert follower.finish() == sha(data)


def test_nothing_was_ever_announced(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"hello")
    assert follower.finish() == sha(b"hello")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert Follower(tmp_path / "x").finish() == sha(b"") == digest_of(tmp_path / "x")


def test_more_announced_than_there_is_has_no_result(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"short")
    follower = Follower(tmp_path / "x")
    follower.announce(1 << 30)
    follower.stop()
    assert follower._result == ""


def test_a_file_that_never_comes(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        follower.finish()
    follower.stop()
