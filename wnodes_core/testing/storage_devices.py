"""The storage contract for providers whose mounts are devices of the VM: it is booted with all that the tests use.

::

    class TestMine(StorageDevices):
        provider, name = "my_package.storage", "mine"

The author's conftest gives, besides ``ordinary_user``, the fixture ``boot_with``: called with mounts and a provider it
gives a context, in which a VM of the ordinary user's runs with those mounts, mounted in the guest (``run`` as in
``GuestChannel.run``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import Mount
from wnodes_core.testing.storage_attacks import StorageAttacks
from wnodes_core.testing.storage_guest import MountIt

BootWith = Callable[[tuple[Mount, ...], str], AbstractContextManager[Any]]


class StorageDevices(StorageAttacks):
    """All of ``StorageAttacks``; the mounts are there from the start."""

    tells_full_disk = True

    @pytest.fixture(scope="class")
    @classmethod
    def mounts(cls, home: Path, small: Path, folder_of: Callable[[str], Path]) -> tuple[Mount, ...]:
        """All that the tests mount."""
        kept = (Mount(str(home), str(home)), Mount(str(home), "/data/ro", True))
        return (*kept, Mount(str(small), "/full"), Mount(str(folder_of("vanishing")), "/vanishing"))

    @pytest.fixture(scope="class")
    @classmethod
    def guest(cls, mounts: tuple[Mount, ...], boot_with: BootWith) -> Iterator[Any]:
        """A VM that has them."""
        with boot_with(mounts, cls.name) as booted:
            yield booted

    @pytest.fixture(scope="class")
    @classmethod
    def mount_it(cls, mounts: tuple[Mount, ...], guest: Any) -> MountIt:
        """Make sure of a mount."""

        def mount(source: Path, target: str, *, read_only: bool = False) -> dict[str, Any]:
            assert Mount(str(source), target, read_only) in mounts, "the VM was booted without it"
            return {}

        return mount
