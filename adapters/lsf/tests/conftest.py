"""A cluster of the simulator with hooks that write down what was done to them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lsf_recorder import Recorder
from wnodes_lsf.testing import make_user


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can walk into (pytest's own is root's alone)."""
    made = Path(tempfile.mkdtemp(prefix="wl-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=["T"])
def cluster(request: pytest.FixtureRequest, folder: Path) -> Iterator[Recorder]:
    """Up, with a user; ``indirect`` parameters choose the release."""
    make_user()
    with Recorder(folder, release=request.param) as made:
        yield made
