"""The hypervisor is asked once a boot; a failure is told and not remembered."""

from __future__ import annotations

import json

from wnodes_core import command
from wnodes_core.agent import parts
from wnodes_core.errors import CommandError


def test_an_answer_is_remembered_for_this_boot_and_wish(tmp_path, monkeypatch):
    asked = []

    def run(argv, **more):
        asked.append(argv)
        return command.Result(tuple(argv), 0, b'{"accel": "tcg", "notice": "no kvm"}', b"")

    monkeypatch.setattr(command, "run", run)
    for _ in range(2):
        assert parts.probe("auto", str(tmp_path))["accel"] == "tcg"
    assert [argv[1:] for argv in asked] == [
        ["-I", "-m", "wnodes_core.agent.probe", "auto", str(tmp_path / "probe")]
    ]
    parts.probe("tcg", str(tmp_path))
    kept = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({**kept, "key": ["another boot", "tcg"]}))
    parts.probe("tcg", str(tmp_path))
    assert len(asked) == 3


def test_a_failing_probe_is_a_host_error_and_is_asked_again(tmp_path, monkeypatch):
    def run(argv, **more):
        raise CommandError(argv, 1, "no libvirt")

    monkeypatch.setattr(command, "run", run)
    error = parts.probe("auto", str(tmp_path))["error"]
    assert error["kind"] == "LibvirtDown"
    assert "no libvirt" in error["message"]
    assert not (tmp_path / "probe.json").exists()
