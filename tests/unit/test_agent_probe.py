"""The hypervisor is asked at each start of wnodesd; a failure is told."""

from __future__ import annotations

from wnodes_core import command
from wnodes_core.agent import parts
from wnodes_core.errors import CommandError


def test_each_start_asks_anew_for_rights_and_versions_change(tmp_path, monkeypatch):
    asked = []

    def run(argv, **more):
        asked.append(argv)
        return command.Result(tuple(argv), 0, b'{"accel": "tcg", "notice": "no kvm"}', b"")

    monkeypatch.setattr(command, "run", run)
    for _ in range(2):
        assert parts.probe("auto", str(tmp_path))["accel"] == "tcg"
    assert [argv[1:] for argv in asked] == [
        ["-I", "-m", "wnodes_core.agent.probe", "auto", str(tmp_path / "probe")]
    ] * 2


def test_a_failing_probe_is_a_host_error_and_is_asked_again(tmp_path, monkeypatch):
    def run(argv, **more):
        raise CommandError(argv, 1, "no libvirt")

    monkeypatch.setattr(command, "run", run)
    error = parts.probe("auto", str(tmp_path))["error"]
    assert error["kind"] == "LibvirtDown"
    assert "no libvirt" in error["message"]
