"""The image store: images by digest, fetched once, verified, shared read-only by every VM of the node.

The names below are loaded when they are asked for: every keeper imports this package for its
disks alone, and the store with its HTTP client would cost it 20 ms a start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wnodes_core.images.catalogue import Entry, Part
    from wnodes_core.images.layers import Stores, node_store, open_stores
    from wnodes_core.images.purge import Purged
    from wnodes_core.images.store import Store
    from wnodes_core.images.users import User

__all__ = ["Entry", "Part", "Purged", "Store", "Stores", "User", "node_store", "open_stores"]

_HOMES = {
    "Entry": "catalogue",
    "Part": "catalogue",
    "Purged": "purge",
    "Store": "store",
    "Stores": "layers",
    "User": "users",
    "node_store": "layers",
    "open_stores": "layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
