"""A user's own store before the node's: what the node has is never fetched twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wnodes_core.errors import UnknownImage, WnodesError
from wnodes_core.images.catalogue import Entry, resolve
from wnodes_core.images.flight import Progress, quiet
from wnodes_core.images.naming import as_ref
from wnodes_core.images.store import Store
from wnodes_core.images.users import User
from wnodes_core.model import Image, ImageRef

if TYPE_CHECKING:
    from wnodes_core.settings import Settings

SITE_CATALOGUE = "/etc/wnodes/images.d"
NODE_FOLDER = "/var/lib/wnodes/images"


@dataclass(frozen=True)
class Stores:
    """The stores that one user sees: ``own`` is written, ``node`` only read. root has one, its own."""

    own: Store
    node: Store | None = None

    def __iter__(self) -> Iterator[Store]:
        return iter((self.own,) if self.node is None else (self.own, self.node))

    def resolve(self, ref: str | ImageRef, user: User | None = None) -> Entry:
        """The image that a user means, from the first catalogue that knows the name.

        Raises BadRequest, UnknownImage, AmbiguousImage, ImageDenied.
        """
        ref, user = as_ref(ref), user or User.current()
        for store in self:
            try:
                return store.resolve(ref, user)
            except UnknownImage as error:
                hint = error.hint
        try:
            return resolve([entry for store in self for entry in store.entries()], ref, user)
        except UnknownImage as error:
            error.hint = hint
            raise

    def list(self, user: User | None = None) -> Sequence[Entry]:
        """The images that a user may have; an own one hides the node's of the same name."""
        found: dict[str, Entry] = {}
        for store in self:
            for entry in store.list(user):
                found.setdefault(str(entry), entry)
        return [found[name] for name in sorted(found)]

    def problems(self) -> Sequence[WnodesError]:
        """What is wrong with catalogue files."""
        return [problem for store in self for problem in store.problems()]

    def image(self, entry: Entry) -> Image | None:
        """The image if it lies in either store, readable by us."""
        return next((image for store in self if (image := store.image(entry))), None)

    def holder(self, entry: Entry) -> Store | None:
        """The store in which the image lies, readable by us."""
        return next((store for store in self if store.image(entry)), None)

    def ensure(self, entry: Entry, progress: Progress = quiet, deadline: float | None = None) -> Image:
        """The image from wherever it lies, else fetched into our own store. Raises as ``Store.ensure``."""
        holder = self.holder(entry) or self.own
        if holder is self.own:
            return self.own.ensure(entry, progress, deadline)
        image = holder.image(entry)
        return image if image is not None else self.own.ensure(entry, progress, deadline)


def node_store(settings: Settings, hook: Any = None, *, site: str = SITE_CATALOGUE) -> Store:
    """The node's store as root's settings say, with the site's own catalogue files."""
    return Store(settings.images.folder, hook, extra=(site,))


def open_stores(settings: Settings, hook: Any = None, *, site: str = SITE_CATALOGUE, node: str = NODE_FOLDER) -> Stores:
    """The stores for whoever we run as: root writes the node's, anybody else their own.

    An ordinary user's settings name the own store; the node's is looked for in ``node``.
    """
    if os.geteuid() == 0:
        return Stores(node_store(settings, hook, site=site))
    return Stores(Store(settings.images.folder, hook), Store(node, hook, extra=(site,)))
