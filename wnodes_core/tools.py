"""Doors for providers and backends: programs, files, processes. Adapters need none of these."""

from wnodes_core.command import PATH, Result, clean_environment, run, spawn
from wnodes_core.files import (
    full_disk_is_host_error,
    private_folder,
    read_tail,
    remove_tree,
    sync_folder,
    write_atomic,
)
from wnodes_core.processes import alive, ancestry, kill, open_pidfd, read, table

__all__ = [
    "PATH",
    "Result",
    "alive",
    "ancestry",
    "clean_environment",
    "full_disk_is_host_error",
    "kill",
    "open_pidfd",
    "private_folder",
    "read",
    "read_tail",
    "remove_tree",
    "run",
    "spawn",
    "sync_folder",
    "table",
    "write_atomic",
]
