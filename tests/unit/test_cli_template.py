"""``wnodes template``: what is listed, what is removed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wnodes_core.cli import main
from wnodes_core.templates.shelf import Shelf

from test_templates_shelf import ID, leave  # isort: skip


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    config = tmp_path / "wnodes.yaml"
    config.write_text(f"images: {{folder: {tmp_path}/images}}\nwarm: {{folder: {tmp_path}/templates}}\n")
    monkeypatch.setenv("WNODES_CONFIG", str(config))
    shelf = Shelf(tmp_path / "templates")
    shelf.make()
    (tmp_path / "image").write_bytes(b"image")
    shelf.put(*leave(tmp_path, tmp_path / "image"))
    return shelf


def test_list_shows_what_a_clone_can_have(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "list"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["TEMPLATE", "IMAGE", "WAY", "ACCEL", "CPUS", "MEMORY", "DISK", "USED"]
    assert row.split()[:5] == [ID, "0" * 12, "mapped", "tcg", "1"]
    assert "512 MiB to 4.0 GiB" in row


def test_list_for_programs(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "list", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["id"], found["shape"]["cpus"]) == (ID, 1)


@pytest.mark.parametrize("words", [[ID], [ID[:4]], ["--all"]])
def test_remove(shelf: Shelf, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["template", "remove", *words]) == 0
    assert capsys.readouterr().out == f"{ID}\n"
    assert shelf.all() == []


@pytest.mark.parametrize("words", [[], ["f"], [ID, "--all"], ["../x"]])
def test_remove_wants_to_know_what(shelf: Shelf, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["template", "remove", *words]) == 1
    assert "want" in capsys.readouterr().err
    assert len(shelf.all()) == 1


def test_build_of_an_unknown_image_says_so(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["template", "build", "nosuch"]) == 1
    assert "nosuch" in capsys.readouterr().err
