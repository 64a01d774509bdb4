"""``wnodes config``, ``plugins`` and ``doctor``: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wnodes_core import cli, doctor
from wnodes_core.doctor_finding import Finding, State
from wnodes_core.plugins import Found


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "wnodes.yaml"
    path.write_text("accel: tcg\nplugins:\n  disabled: [a, b]\n")
    monkeypatch.setenv("WNODES_CONFIG", str(path))
    return path


def test_config_check(config: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["config", "check"]) == 0
    assert capsys.readouterr().out == f"ok  {config}\n"
    assert cli.main(["config", "check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "sources": [str(config)]}
    bad = tmp_path / "bad.yaml"
    bad.write_text("acel: tcg")
    assert cli.main(["config", "check", str(bad)]) == 1
    assert capsys.readouterr().err == f"wnodes: error: {bad}:1:1: unknown key 'acel'\n  hint: did you mean accel?\n"


def test_config_show(config: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["config", "show"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["KEY", "VALUE", "ORIGIN"]
    assert ["accel", "tcg", f"{config}:1"] in lines
    assert ["plugins.disabled", "a,", "b", f"{config}:3"] in lines
    assert cli.main(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"key": "accel", "value": "tcg", "origin": f"{config}:1"} in shown["settings"]
    assert cli.main(["config", "show", "--yaml"]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out)
    assert cli.main(["config", "show", "--yaml", str(copy)]) == 0
    assert capsys.readouterr().out == copy.read_text()


@pytest.mark.parametrize("problem, code", [("", 0), ("disabled by the settings", 0), ("ImportError: x", 1)])
def test_plugins(config: Path, mocker, capsys, problem: str, code: int) -> None:
    plugins = mocker.patch("wnodes_core.cli.plugins.Plugins")
    plugins.return_value.found = [Found("mine", "pkg 1", 1, problem)]
    mocker.patch("importlib.metadata.entry_points", return_value=[])
    assert cli.main(["plugins"]) == code
    assert plugins.call_args.kwargs == {"disabled": ("a", "b")}
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "mine",
        "plug-in",
        "pkg",
        "1",
        "1",
        *(problem or "ok").split(),
    ]
    assert cli.main(["plugins", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"kind": "plug-in", "name": "mine", "origin": "pkg 1", "api_level": 1, "problem": problem}
    ]


FINDINGS = [Finding("kvm device", State.OK, "fine"), Finding("clock", State.NOTICE, "off \x1b[31m", "set it")]


def test_doctor(mocker, capsys) -> None:
    examine = mocker.patch.object(doctor, "examine", return_value=FINDINGS)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == (
        "ok       kvm device  fine\nnotice   clock       off \\x1b[31m\n                     -> set it\n"
    )
    assert cli.main(["doctor", "--problems", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "clock", "state": "notice", "seen": "off \x1b[31m", "advice": "set it"}
    ]
    examine.return_value = [*FINDINGS, Finding("disk", State.PROBLEM, "full", "free some")]
    assert cli.main(["doctor"]) == 1
