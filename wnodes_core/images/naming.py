"""References from text, and errors that say which image they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wnodes_core.errors import WnodesError
from wnodes_core.model import ImageRef


def as_ref(ref: str | ImageRef) -> ImageRef:
    """A reference from its text. Raises BadRequest."""
    return ref if isinstance(ref, ImageRef) else ImageRef.parse(ref)


@contextmanager
def naming(image: object) -> Iterator[None]:
    """Put the image's name before the message of whatever goes wrong inside."""
    try:
        yield
    except WnodesError as error:
        if not error.message.startswith("image "):
            error.message = f"image '{image}': {error.message}"
            error.args = (error.message,)
        raise
