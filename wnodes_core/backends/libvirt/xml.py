"""Typed objects that write themselves as XML: one declaration an attribute, byte-stable order.

The idea (not the code) is virt-manager's: a class lists where each of its values lives, and
nothing else. There is no policy here; which values a VM gets is decided in ``domain.py``.

::

    @dataclass(kw_only=True)
    class Rng(Node):
        TAG = "rng"
        model: str = at("@model", "virtio")
        source: str = at("backend", "/dev/urandom")

A path is element names, then ``@attribute``, or ends in an element for its text. A value that is
None is left out; True makes an empty element; a Node, or a tuple of Nodes, is put below its path.
Elements appear in the order of the declarations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from lxml import etree

NAMESPACES = {"wnodes": "urn:wnodes:lease:1"}


def at(path: str, default: Any = None, *, convert: Callable[[Any], str] = str) -> Any:
    """Declare that a dataclass field lives at ``path``."""
    return field(default=default, metadata={"path": path, "convert": convert})


def on_off(value: bool) -> str:
    """libvirt's words for a truth value."""
    return "on" if value else "off"


def yes_no(value: bool) -> str:
    """libvirt's other words for a truth value."""
    return "yes" if value else "no"


@dataclass(kw_only=True)
class Node:
    """An XML element whose content is its dataclass fields."""

    TAG: ClassVar[str] = ""

    def element(self) -> etree._Element:
        """The element, with all that has a value."""
        root = etree.Element(_qualified(self.TAG), nsmap=_used_namespaces(self.TAG))
        for declared in fields(self):
            value = getattr(self, declared.name)
            if value is not None and value != ():
                _place(root, declared.metadata["path"], value, declared.metadata["convert"])
        return root

    def xml(self) -> str:
        """The element as indented text, without an XML declaration."""
        root = self.element()
        etree.indent(root, "  ")
        return etree.tostring(root, encoding="unicode") + "\n"


def _place(root: etree._Element, path: str, value: Any, convert: Callable[[Any], str]) -> None:
    steps = [step for step in path.split("/") if step]
    attribute = steps.pop()[1:] if steps and steps[-1].startswith("@") else ""
    target = root
    for step in steps:
        name = _qualified(step)
        found = target.find(name)
        target = etree.SubElement(target, name, nsmap=_used_namespaces(step)) if found is None else found
    if attribute:
        target.set(attribute, convert(value))
    elif isinstance(value, (Node, tuple)):
        for child in value if isinstance(value, tuple) else (value,):
            target.append(child.element())
    elif value is not True:
        target.text = convert(value)


def _qualified(name: str) -> str:
    prefix, colon, local = name.partition(":")
    return f"{{{NAMESPACES[prefix]}}}{local}" if colon else name


def _used_namespaces(name: str) -> dict[str, str] | None:
    prefix, colon, _ = name.partition(":")
    return {prefix: NAMESPACES[prefix]} if colon else None
