"""9p in a real guest, whose kernel has it: the storage contract, and what is 9p's own."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from storage_guests import booted  # noqa: E402

from wnodes_core.model import Image  # noqa: E402
from wnodes_core.testing.storage_devices import BootWith, StorageDevices  # noqa: E402

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def boot_with(full_kernel_image: Image, ordinary_user: Any) -> BootWith:
    return partial(booted, full_kernel_image, ordinary_user)


class TestNinep(StorageDevices):
    provider, name = "wnodes_core.storage.ninep", "9p"
    locks_are_apart = False  # Linux makes a lock of fcntl's out of flock's (fs/9p/vfs_file.c)
