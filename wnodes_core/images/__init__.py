"""The image store: images by digest, fetched once, verified, shared read-only by every VM of the node."""

from wnodes_core.images.catalogue import Entry, Part
from wnodes_core.images.layers import Stores, node_store, open_stores
from wnodes_core.images.purge import Purged
from wnodes_core.images.store import Store
from wnodes_core.images.users import User

__all__ = ["Entry", "Part", "Purged", "Store", "Stores", "User", "node_store", "open_stores"]
