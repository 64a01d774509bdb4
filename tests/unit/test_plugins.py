"""Finding plug-ins: who is asked first, and that a broken one harms nobody."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.api import Disk, hookimpl
from wnodes_core.errors import BrokenPlugin, NoProvider
from wnodes_core.plugins import PLUGIN_GROUP, Plugins

DISK = Disk("/d", "qcow2")


def provider(answer: Any, level: Any = 1) -> Any:
    """A plug-in that answers ``wnodes_disk_create``."""

    @hookimpl
    def wnodes_disk_create(disk: Disk) -> Any:
        return answer

    return SimpleNamespace(wnodes_api=level, wnodes_disk_create=wnodes_disk_create)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Install modules as a stranger's package would: ``installed(name, source)``."""
    installed: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, source: str) -> None:
        module, info = f"{name}_module", tmp_path / f"{name}-1.0.dist-info"
        (tmp_path / f"{module}.py").write_text(source)
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{PLUGIN_GROUP}]\n{name} = {module}\n")
        importlib.invalidate_caches()
        installed.append(module)

    yield install
    for module in installed:
        sys.modules.pop(module, None)


def source_of(answer: str, level: int = 1) -> str:
    lines = ["from wnodes_core.api import hookimpl", f"wnodes_api = {level}", "@hookimpl"]
    return "\n".join([*lines, "def wnodes_disk_create(disk):", f"    return {answer}"])


def problems(plugins: Plugins) -> dict[str, str]:
    return {found.name: found.problem for found in plugins.found if found.problem}


def test_the_newest_is_asked_first_and_none_passes_on() -> None:
    plugins = Plugins(builtins=(), scan=False)
    plugins.register(provider("older"), "older")
    plugins.register(provider("newer"), "newer")
    assert plugins.hook.wnodes_disk_create(disk=DISK) == "newer"
    plugins.register(provider(None), "shy")
    assert plugins.hook.wnodes_disk_create(disk=DISK) == "newer"


def test_a_strangers_plugin_is_asked_before_a_builtin(installed: Any) -> None:
    installed("site", source_of("'the site'"))
    plugins = Plugins(builtins=("wnodes_core.images.disks",))
    assert [found.name for found in plugins.found] == ["wnodes_core.images.disks", "site"]
    assert plugins.hook.wnodes_disk_create(disk=DISK) == "the site"


def test_without_a_scan_strangers_are_not_loaded(installed: Any) -> None:
    installed("site", source_of("'the site'"))
    assert Plugins(builtins=(), scan=False).hook.wnodes_disk_create(disk=DISK) is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        (source_of("1", level=99), "wnodes_api is 99"),
        (source_of("1").replace("wnodes_api = 1", ""), "wnodes_api is None"),
        (source_of("1").replace("(disk)", "(disk, colour)"), "colour"),
        (source_of("1").replace("wnodes_disk_create", "wnodes_disk_craete"), "wnodes_disk_craete"),
        (source_of("1").replace("(disk)", "(disk=None)"), "disk has a default"),
    ],
    ids=["raises", "missing-import", "syntax", "wrong-level", "no-level", "wrong-argument", "unknown-hook", "default"],
)
def test_a_broken_plugin_is_reported_and_harms_nobody(installed: Any, source: str, problem: str) -> None:
    installed("good", source_of("'good'"))
    installed("broken", source)
    plugins = Plugins(builtins=())
    assert list(problems(plugins)) == ["broken"]
    assert problem in problems(plugins)["broken"]
    assert plugins.hook.wnodes_disk_create(disk=DISK) == "good"


def test_a_disabled_plugin_is_listed_and_not_asked(installed: Any) -> None:
    installed("good", source_of("'good'"))
    installed("unwanted", "raise AssertionError('it was imported')")
    plugins = Plugins(builtins=(), disabled=["unwanted"])
    assert problems(plugins) == {"unwanted": "disabled by the settings"}
    assert plugins.hook.wnodes_disk_create(disk=DISK) == "good"


def test_the_builtins_are_sound() -> None:
    assert problems(Plugins(scan=False)) == {}


def test_an_adapter_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoProvider, match="'cloudy'") as caught:
        Plugins(lrms="cloudy", builtins=(), scan=False)
    assert caught.value.hint == "pip install wnodes-cloudy"


def test_an_adapter_that_is_broken_is_raised_because_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wnodes_rusty").mkdir()
    (tmp_path / "wnodes_rusty/__init__.py").touch()
    (tmp_path / "wnodes_rusty/plugin.py").write_text("raise ValueError('rust')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BrokenPlugin, match="adapter 'rusty': ValueError: rust"):
        Plugins(lrms="rusty", builtins=(), scan=False)
    sys.modules.pop("wnodes_rusty")


def test_trace_says_who_was_asked_and_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WNODES_TRACE", "1")
    plugins = Plugins(builtins=(), scan=False)
    plugins.register(provider("made"), "maker")
    plugins.register(provider(None), "shy")
    plugins.hook.wnodes_disk_create(disk=DISK)
    plugins.hook.wnodes_disk_delete(disk=DISK)
    said = capsys.readouterr().err
    lines = [re.sub(r"in [\d.]+ ms", "in N ms", line) for line in said.splitlines()]
    assert lines == [
        "wnodes: trace: wnodes_disk_create by shy: None in N ms",
        "wnodes: trace: wnodes_disk_create by maker: 'made' in N ms",
        "wnodes: trace: wnodes_disk_delete by nobody: None in N ms",
    ]
    monkeypatch.setenv("WNODES_TRACE", "0")
    quiet = Plugins(builtins=(), scan=False)
    quiet.hook.wnodes_disk_create(disk=DISK)
    assert capsys.readouterr().err == ""
