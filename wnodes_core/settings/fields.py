"""How a field of the settings is declared: default, words of help, converter."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from wnodes_core.settings import values


def setting(
    default: Any, doc: str, convert: values.Convert | None = None, *, node_only: bool = False, example: Any = None
) -> Any:
    """A field with its help text and the converter of its word (or of each word of its list).

    ``node_only``: it describes the node's own wnodesd, so a user's embedded run does not take it
    from the site's file. ``example``: for the sample file, where the default would show nothing.
    """
    metadata = {"doc": doc, "convert": convert, "node_only": node_only, "example": example}
    if default in ({}, []):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, doc: str) -> Any:
    """A field that is a section of its own."""
    return field(default_factory=cls, metadata={"doc": doc})
