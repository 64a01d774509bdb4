"""Builders of one template: one at a time, all served, and nothing left of those that fail."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import SettingsError, TransientError, WnodesError
from wnodes_core.model import Disk, Image, Shape, Template
from wnodes_core.templates import Shelf, Wanted
from wnodes_core.templates.builder import Account, Builder
from wnodes_core.templates.shelf import MADE


class Scripted(Builder):
    """A builder whose guest is a few files; ``runs`` counts, ``fails`` makes it fail."""

    runs: list[float] = []
    fails = ""

    def _run(self, wanted: Wanted, folder: Path) -> None:
        self.runs.append(time.monotonic())
        time.sleep(0.3)
        if self.fails:
            raise TransientError(self.fails)
        for name in ("memory", "state", "argv.json", "overlay.qcow2"):
            (folder / name).write_bytes(name.encode())
        disks = (Disk(f"{folder}/overlay.qcow2", "qcow2", wanted.image.path, "raw"),)
        template = Template(
            wanted.id, str(folder), "mapped", wanted.image.digest, "tcg", Shape(1, 512), f"{folder}/memory", disks,
            {"argv": "argv.json", "state": "state"}, 2,
        )  # fmt: skip
        (folder / MADE).write_text(json.dumps(asdict(template)))


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    (tmp_path / "image").write_bytes(b"i")
    return Wanted(Image("deb", "1", "sha256:" + "a" * 64, str(tmp_path / "image"), "raw"), "tcg", 1, 512, 512, "qemu")


@pytest.fixture
def builder(tmp_path: Path) -> Scripted:
    Scripted.runs, Scripted.fails = [], ""
    return Scripted(Shelf(tmp_path / "templates"), Account(os.geteuid(), os.getegid()), ("mapped",), 60)


def test_a_hundred_that_want_it_have_it_built_once(builder: Scripted, wanted: Wanted) -> None:
    with ThreadPoolExecutor(100) as pool:
        got = list(pool.map(lambda _: builder.build(wanted), range(100)))
    assert len(builder.runs) == 1
    assert {template.id for template in got} == {wanted.id}
    assert builder.shelf.leftovers() == []


def test_a_failure_is_that_of_all_who_waited_and_of_none_who_come_later(builder: Scripted, wanted: Wanted) -> None:
    Scripted.fails = "it did not boot"
    gate = threading.Barrier(20)

    def attempt(_: int) -> str:
        gate.wait()
        with pytest.raises(WnodesError) as caught:
            builder.build(wanted)
        return caught.value.message

    with ThreadPoolExecutor(20) as pool:
        said = set(pool.map(attempt, range(20)))
    assert said == {"it did not boot"}
    assert len(builder.runs) == 1
    assert builder.shelf.leftovers() == []
    Scripted.fails = ""
    assert builder.build(wanted).id == wanted.id


@pytest.mark.parametrize("word", ["", "[]", "{}", "{", '{"id": "../x"}'])
def test_a_builder_that_leaves_nonsense_leaves_no_template(
    builder: Scripted, wanted: Wanted, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    def run(self: Any, wanted: Wanted, folder: Path) -> None:
        (folder / MADE).write_text(word)

    monkeypatch.setattr(Scripted, "_run", run)
    with pytest.raises(WnodesError):
        builder.build(wanted)
    assert (builder.shelf.all(), builder.shelf.leftovers()) == ([], [])


def test_a_last_word_that_is_a_link_is_not_read(
    builder: Scripted, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "_run", lambda self, wanted, folder: (folder / MADE).symlink_to("/etc/hostname"))
    with pytest.raises((WnodesError, OSError)):
        builder.build(wanted)
    assert builder.shelf.leftovers() == []


def test_a_sweep_spares_the_folder_of_a_living_builder(builder: Scripted, wanted: Wanted) -> None:
    building = threading.Thread(target=builder.build, args=(wanted,))
    building.start()
    while not builder.shelf.leftovers():
        time.sleep(0.01)
    builder.sweep()
    building.join()
    assert builder.shelf.find(wanted.id)


def test_a_sweep_removes_what_a_dead_one_left(builder: Scripted, wanted: Wanted) -> None:
    builder.shelf.make()
    (builder.shelf.root / f"building-{wanted.id}-ab12").mkdir(mode=0o700)
    (builder.shelf.root / f".gone-{wanted.id}-ab12").mkdir()
    builder.sweep()
    assert builder.shelf.leftovers() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="others build as themselves")
def test_an_unknown_account_is_a_mistake_of_the_settings() -> None:
    with pytest.raises(SettingsError, match="warm.build_user 'nosuch'"):
        Account.of("nosuch")
