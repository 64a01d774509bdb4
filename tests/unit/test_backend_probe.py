"""KVM is proved; every way in which it fails ends in TCG with a notice, or in NoKvm."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from wnodes_core.backends.libvirt import host, memory, probe
from wnodes_core.errors import CommandError, LibvirtDown, NoKvm, SettingsError
from wnodes_core.tools import Result


class Programs:
    """Stands for ``run``: versions are answered, probe guests counted and played by ``guest``."""

    def __init__(self) -> None:
        self.installed = "qemu 1, libvirt 1"
        self.guests: list[list[str]] = []
        self.asked = 0
        self.guest: Callable[[list[str]], Result] = lambda argv: Result(tuple(argv), 0, b"WNODES-OK\n", b"")
        self.version = Result((), 0, b"QEMU emulator version 7.2.0 (x)\n", b"")
        self.libvirt = Result((), 0, b"9.0.0\n", b"")

    def __call__(self, argv: list[str], **_options: object) -> Result:
        if argv[-1] == "--version":
            self.asked += 1
            return self.version
        if "wnodes_core.backends.libvirt.embed" in argv:
            return self.libvirt
        self.guests.append(argv)
        return self.guest(argv)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs()
    monkeypatch.setattr(probe, "run", programs)
    monkeypatch.setattr(host, "installed", lambda: programs.installed)
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(memory, "recall", lambda name, _state: kept.get(name))
    monkeypatch.setattr(memory, "remember", lambda name, data, _state: kept.update({name: data}))
    return programs


@pytest.fixture
def device(tmp_path: Path) -> str:
    file = tmp_path / "kvm"
    file.touch()
    file.chmod(0o666)
    return str(file)


def hang(argv: list[str]) -> Result:
    raise CommandError(argv, None, "", timeout_s=probe.DEADLINE_S)


def abort(argv: list[str]) -> Result:
    return Result(tuple(argv), -6, b"", b"error: failed to set MSR 0x10a\nAssertion failed\n")


def rambles(argv: list[str]) -> Result:
    return Result(tuple(argv), 0, b"", b"")


def test_a_probe_guest_that_speaks_is_the_proof(programs: Programs, tmp_path: Path, device: str) -> None:
    found = probe.probe("auto", str(tmp_path), device=device)
    assert found == {"accel": "kvm", "notice": "", "qemu": "7.2.0", "libvirt": "9.0.0"}
    assert "q35,accel=kvm" in programs.guests[0]


@pytest.mark.parametrize(("guest", "told"), [(hang, "hung"), (abort, "MSR 0x10a"), (rambles, "did not run")])
def test_a_probe_guest_that_fails_means_tcg(
    programs: Programs, tmp_path: Path, device: str, guest: Callable[[list[str]], Result], told: str
) -> None:
    programs.guest = guest
    found = probe.probe("auto", str(tmp_path), device=device)
    assert found["accel"] == "tcg"
    assert told in found["notice"]
    with pytest.raises(NoKvm, match="KVM is demanded"):
        probe.probe("kvm", str(tmp_path), device=device)
    assert len(programs.guests) == 1, "the answer is remembered"


def test_the_answer_is_for_one_qemu_only(programs: Programs, tmp_path: Path, device: str) -> None:
    programs.guest = hang
    probe.probe("auto", str(tmp_path), device=device)
    programs.version = Result((), 0, b"QEMU emulator version 9.1.0\n", b"")
    programs.installed = "qemu 2, libvirt 1"
    programs.guest = Programs().guest
    assert probe.probe("auto", str(tmp_path), device=device)["accel"] == "kvm"


def test_versions_are_asked_once_for_each_installation(programs: Programs, tmp_path: Path) -> None:
    found = [probe.probe("tcg", str(tmp_path)) for _ in range(2)]
    assert (found[0], programs.asked) == (found[1], 1)
    programs.installed = "qemu 1, libvirt 2"
    programs.libvirt = Result((), 0, b"9.1.0\n", b"")
    assert (probe.probe("tcg", str(tmp_path))["libvirt"], programs.asked) == ("9.1.0", 2)
    programs.installed = ""  # it cannot be told whether it is the same
    for _ in range(2):
        probe.probe("tcg", str(tmp_path))
    assert programs.asked == 4


def test_no_device_needs_no_guest(programs: Programs, tmp_path: Path) -> None:
    found = probe.probe("auto", str(tmp_path), device=str(tmp_path / "none"))
    assert "does not exist" in found["notice"]
    assert programs.guests == []


def test_a_device_that_may_not_be_opened(
    programs: Programs, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe.os, "access", lambda _path, _mode: False)
    assert "may not be opened" in probe.probe("auto", str(tmp_path), device=device)["notice"]
    assert programs.guests == []


def test_a_device_for_root_alone_is_none_for_jobs(programs: Programs, tmp_path: Path, device: str) -> None:
    if os.getuid() != 0:
        pytest.skip("an ordinary user's probe is about that user alone")
    Path(device).chmod(0o600)
    assert "root alone" in probe.probe("auto", str(tmp_path), device=device)["notice"]
    os.chown(device, 0, 12345)
    Path(device).chmod(0o660)
    assert probe.probe("auto", str(tmp_path), device=device)["accel"] == "kvm", "its group's users may"


def test_tcg_by_choice_is_no_notice(programs: Programs, tmp_path: Path, device: str) -> None:
    assert probe.probe("tcg", str(tmp_path), device=device)["notice"] == ""
    assert programs.guests == []


def test_a_misspelt_wish(programs: Programs, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'kvn': want kvm, tcg or auto"):
        probe.probe("kvn", str(tmp_path))


def test_no_libvirt_is_told(programs: Programs, tmp_path: Path) -> None:
    programs.libvirt = Result((), 1, b"", b"ModuleNotFoundError: No module named 'libvirt'\n")
    with pytest.raises(LibvirtDown, match="No module named 'libvirt'"):
        probe.probe("tcg", str(tmp_path))


def test_nothing_is_left_in_the_folder(programs: Programs, tmp_path: Path, device: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    programs.guest = hang
    probe.probe("auto", str(folder), device=device)
    assert list(folder.iterdir()) == []


def test_the_state_folder_is_told_from_a_leases() -> None:
    assert probe.state_dir_of("/srv/wnodes/leases/a-1") == "/srv/wnodes"
    assert probe.state_dir_of("/var/tmp/wnodes-7/a-1") == memory.STATE_DIR


def test_the_boot_sector_is_one() -> None:
    sector = probe.boot_sector()
    assert len(sector) == 512
    assert sector.endswith(b"\x55\xaa")
    assert hashlib.sha256(sector).hexdigest() == "ca8d771df5254a8652eb3f8a62054e91fdd005d73727d6158ff6080d5fea8142", "as an assembler makes it"
