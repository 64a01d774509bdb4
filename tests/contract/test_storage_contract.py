"""Every storage provider keeps the same contract."""

from __future__ import annotations

from wnodes_core.testing.storage import StorageContract


class TestSshfs(StorageContract):
    provider, name = "wnodes_core.storage.sshfs", "sshfs"
