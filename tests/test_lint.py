"""The linter and the type checker agree with the tree, in the versions that pip brought."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(HERE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_core_is_typed_strictly(tmp_path):
    argv = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--config-file", f"{HERE}/pyproject.toml"]
    adapters = [path.parent.name for path in HERE.glob("adapters/*/wnodes_*/__init__.py")]
    packages = [word for name in ("wnodes_core", *adapters) for word in ("-p", name)]
    done = subprocess.run([*argv, *packages], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
