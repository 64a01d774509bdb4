"""Every storage provider keeps the same contract."""

from __future__ import annotations

from typing import Any

import pytest

from wnodes_core.testing.storage import SourceContract, StorageContract


class TestSshfs(StorageContract):
    provider, name = "wnodes_core.storage.sshfs", "sshfs"


class TestVirtiofs(StorageContract):
    provider, name, needs = "wnodes_core.storage.virtiofs", "virtiofs", "plug"


class TestNinep(SourceContract):
    provider, name, needs = "wnodes_core.storage.ninep", "9p", "device"


class TestSshfsTcp(StorageContract):
    provider, name, needs = "wnodes_core.storage.sshfs_tcp", "sshfs-tcp", "network"

    @pytest.fixture
    def guest(self) -> dict[str, Any]:
        nic = {"kind": "user", "node": "10.0.2.2", "routes": []}
        return {"port": "org.wnodes.mount.0", "sshfs": True, "fuse": True, "nic": nic}


class TestSshfsTcpOnABridge(TestSshfsTcp):
    @pytest.fixture
    def guest(self) -> dict[str, Any]:
        route = {"to": "127.0.0.1/32", "via": "", "source": "127.0.0.77"}
        nic = {"kind": "tap", "node": "127.0.0.1", "routes": [route]}
        return {"port": "org.wnodes.mount.0", "sshfs": True, "fuse": True, "nic": nic}
