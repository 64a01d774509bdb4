"""A real Slurm for the tests marked ``slurm``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from wnodes_slurm.testing import Cluster, make_user

HOOK = Path(__file__).with_name("hook.py")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can walk into (pytest's own is root's alone)."""
    folder = Path(tempfile.mkdtemp(prefix="wt-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, linuxproc tracking."""
    yield from _cluster(nodes=2)


@pytest.fixture(scope="session")
def cgroup_cluster() -> Iterator[Cluster]:
    """One node, cgroup v1 tracking, limits and accounting."""
    yield from _cluster(nodes=1, cgroup=True, gather="cgroup")


def _cluster(**options: object) -> Iterator[Cluster]:
    make_user()
    folder = Path(tempfile.mkdtemp(prefix="wt-", dir="/tmp"))
    folder.chmod(0o1777)  # sticky: munged refuses a folder above its socket that others may rename in
    made = Cluster(folder, HOOK, **options)
    try:
        yield made.up()
    finally:
        made.lab.down()
        shutil.rmtree(folder)
