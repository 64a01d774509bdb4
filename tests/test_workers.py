"""Two workers of one run never have beside each other what cannot be: conftest.py shares the files out."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent.parent
FILES = [str(path.relative_to(HERE)) for top in ("tests", "adapters") for path in (HERE / top).rglob("test_*.py")]


@pytest.fixture(scope="module")
def conftest() -> Any:
    spec = importlib.util.spec_from_file_location("sharing", HERE / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_whoever_waits_for_the_lock_of_guests_is_in_their_lane(conftest: Any) -> None:
    wanting = re.compile(r"\bfrom (?:guests|network_guests) import|def test_\w+\(.*\bguest: Any\b|\bguest_channel\b")
    locked = [name for name in FILES if wanting.search((HERE / name).read_text())]
    assert len(locked) > 10
    assert {name: conftest.lane(name) for name in locked} == dict.fromkeys(locked, "guests")


def test_slurm_is_one_workers_and_files_are_not_torn(conftest: Any) -> None:
    shares = {}
    for name in FILES:
        (scope,) = {conftest.Lanes._split_scope(None, f"{name}::test_{i}[a::b]") for i in range(2)}
        shares.setdefault(scope, []).append(name)
    together = {scope: names for scope, names in shares.items() if len(names) > 1}
    assert set(together) == {"guests", "slurm"}
    slurm = [name for name in FILES if re.search(r"\bslurm_site\b|pytest\.mark\.slurm", (HERE / name).read_text())]
    assert set(slurm) == set(together["slurm"])


def test_a_test_whose_marker_its_file_does_not_name_is_refused(conftest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        nodeid = "tests/test_house.py::test_x"

        def iter_markers(self) -> list[Any]:
            return [SimpleNamespace(name="guest")]

    with pytest.raises(pytest.UsageError, match="in its own file"):
        conftest.pytest_collection_modifyitems([Item()])


def test_a_run_behind_a_shell_hears_sigint() -> None:
    """Else what the tests start is deaf to it, too, and theirs hang."""
    code = "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); subprocess.run(sys.argv[1:])"
    told = "import conftest, signal; conftest.pytest_configure(); print(signal.getsignal(signal.SIGINT).__name__)"
    argv = [sys.executable, "-c", code, sys.executable, "-c", told]
    done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.stdout == "default_int_handler\n", done.stderr
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
