"""``wnodes image``, from argv to what is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core import cli
from wnodes_core.cli import image_verbs
from wnodes_core.images import Store, Stores
from wnodes_core.plugins import Plugins
from wnodes_core.settings import PurgeSettings


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(tmp_path / "store", Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    images = SimpleNamespace(purge=PurgeSettings(), fetch_timeout_s=30)
    monkeypatch.setattr(image_verbs, "_stores", lambda: Stores(store))
    monkeypatch.setattr(image_verbs.settings, "load", lambda: SimpleNamespace(images=images))
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    monkeypatch.chdir(tmp_path)
    return store


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert cli.main(["image", *words]) == code
    told = capsys.readouterr()
    return told.out, told.err


def run_json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    out, err = run(capsys, *words, "--json", code=code)
    assert err == ""
    return json.loads(out)


def test_the_life_of_an_image(store: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, err = run(capsys, "add", "tiny:1", "disk.raw", "--format", "raw", "--alias", "t", "--fact", "os=none")
    assert out.startswith("tiny:1  sha256:ad7facb2") and err == ""  # under a second: no bar
    header, row = run(capsys, "list")[0].splitlines()
    assert header.split() == ["NAME", "TAG", "ALIASES", "FORMAT", "ARCH", "SIZE", "HERE", "LAST", "USE"]
    assert row.split()[:8] == ["tiny", "1", "t", "raw", "x86_64", "4.0", "KiB", "yes"]
    assert run(capsys, "tag", "t", "tiny:latest")[0].startswith("tiny:latest  sha256:")
    assert run(capsys, "verify", "--all")[0] == "tiny:1  ok\ntiny:latest  ok\n"
    assert run(capsys, "pull", "tiny")[0].startswith("tiny:latest  sha256:")
    shown = run(capsys, "show", "tiny:1")[0]
    assert f"sources      {tmp_path}/disk.raw" in shown and "os" in shown
    assert "tiny:1: the name is removed; its files stay" in run(capsys, "rm", "tiny:1")[0]
    assert "removed 1 files, 4.0 KiB" in run(capsys, "rm", "tiny")[0]
    assert run(capsys, "list")[0].splitlines()[1:] == []


def test_json_has_stable_keys(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (added,) = run_json(capsys, "add", "tiny", "disk.raw", "--format", "raw")
    (listed,) = run_json(capsys, "list")
    assert added["digest"] == listed["digest"] and listed["store"] == "own"
    keys = {"name", "tag", "aliases", "digest", "format", "arch", "sources", "facts", "store", "path", "size_bytes"}
    assert keys <= set(listed) and {"used_by", "catalogue"} <= set(run_json(capsys, "show", "tiny"))
    assert run_json(capsys, "pull", "tiny")[0]["path"] == listed["path"]
    assert run_json(capsys, "verify", "tiny") == [{"image": "tiny:latest", "digest": added["digest"], "problem": ""}]
    assert run_json(capsys, "purge", "--dry-run") == []
    assert run_json(capsys, "rm", "tiny")[0]["size_bytes"] == 4096


def test_purge_says_what_goes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "add", "tiny", "disk.raw", "--format", "raw")
    os.utime(store.layout.blob(store.resolve("tiny").disk.digest), (0, 0))
    out = run(capsys, "purge", "--dry-run")[0]
    assert "tiny:latest" in out and "not used for" in out and "would remove 1 files" in out
    assert "removed 1 files" in run(capsys, "purge")[0]
    assert run(capsys, "purge")[0] == "removed nothing\n"
    assert " no " in run(capsys, "list")[0].splitlines()[1]


def test_a_wrong_image_is_told_and_the_code_is_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "add", "tiny", "disk.raw", "--format", "raw")
    path = store.layout.blob(store.resolve("tiny").disk.digest)
    os.chmod(path, 0o644)
    path.write_bytes(b"x" * 4096)
    out, _ = run(capsys, "verify", "tiny", code=1)
    assert "has become sha256:" in out and "fetches it anew" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["show", "tinny"], 1, "image 'tinny': no such image; did you mean tiny?"),
        (["show", "a b"], 1, "image 'a b': want NAME"),
        (["pull"], 1, "want IMAGE … or --all"),
        (["pull", "tiny", "--all"], 1, "not both"),
        (["add", "x", "disk.raw"], 1, "say that the format is raw"),
        (["add", "x", "absent", "--format", "raw"], 75, "absent: No such file or directory"),
        (["add", "x", "disk.raw", "--fact", "os"], 1, "want KEY=VALUE"),
        (["add", "x", "disk.raw", "--cmdline", "quiet"], 1, "want --kernel"),
        (["add", "x", "disk.raw", "--format", "raw", "--sha256", "12"], 1, "sha256 '12': want 64 hexadecimal digits"),
        (
            ["add", "x", "disk.raw", "--format", "raw", "--sha256", "0" * 64],
            1,
            f"the catalogue wants sha256:{'0' * 64}",
        ),
        (["add", "x", "ftp://h/x", "--format", "raw"], 75, "no plug-in fetches that kind of source"),
        (["rm", "absent"], 1, "image 'absent'"),
        (["tag", "tiny", "x/y"], 1, "image 'x/y': want NAME"),
    ],
)
def test_errors_say_value_and_wish(
    store: Store, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    run(capsys, "add", "tiny", "disk.raw", "--format", "raw")
    out, err = run(capsys, *words, code=code)
    assert out == "" and err.startswith("wnodes: error: ") and said in err
    assert [entry.name for entry in store.list()] == ["tiny"]


def test_a_broken_catalogue_file_is_a_warning(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "add", "tiny", "disk.raw", "--format", "raw")
    (store.layout.catalogue / "bad.json").write_text("{")
    out, err = run(capsys, "list")
    assert "tiny" in out and err.startswith("wnodes: warning: ") and "bad.json" in err


@pytest.mark.parametrize("verb", ["add", "pull", "list", "show", "tag", "verify", "rm", "purge"])
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["image", verb, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and f"wnodes image {verb}" in out and "examples:" in out and "--json" in out
