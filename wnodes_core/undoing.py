"""Undoing one resource of a lease's journal, in any process with the user's rights, after any crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wnodes_core import mounting
from wnodes_core.errors import WnodesError
from wnodes_core.journal import Resource
from wnodes_core.model import Disk
from wnodes_core.plan import vm_from_dict
from wnodes_core.plugging import undo_port


def undo_one(resource: Resource, hook: Any) -> None:
    """Undo one open resource of a journal; "already gone" is fine.

    Raises WnodesError or OSError if it is still there afterwards.
    """
    undo = _UNDO.get(resource.kind)
    if undo is None:
        raise WnodesError(f"journal names a {resource.kind!r}, which nothing here can undo")
    undo(resource, hook)


def _undo_vm(resource: Resource, hook: Any) -> None:
    facts = {key: value for key, value in resource.data.items() if key not in ("pid", "started")}
    if not hook.wnodes_vm_stop(vm=vm_from_dict(facts)):
        raise WnodesError(f"VM {resource.name} is still there")


def _undo_disk(resource: Resource, hook: Any) -> None:
    hook.wnodes_disk_delete(disk=Disk(**resource.data))


_UNDO: dict[str, Callable[[Resource, Any], None]] = {
    "vm": _undo_vm,
    "disk": _undo_disk,
    "attachment": mounting.undo,
    "port": undo_port,
}
