"""YAML text as plain trees that remember file, line and column of every key and value.

Only ``yaml.compose`` is used: no tag ever makes an object. Scalars stay the text that was
written, so that a user called ``no`` or a tag ``1e3`` means what it says (YAML 1.1 would not).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnodes_core.errors import SettingsError

MAX_BYTES = 256 << 10  # far above any real site
_MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {_TAG + t for t in ("str", "int", "float", "bool", "null", "timestamp", "value", "map", "seq")}


@dataclass(frozen=True)
class Spot:
    """A place in a file, counted from 1 as editors do."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def error(self, message: str, hint: str = "") -> SettingsError:
        """A SettingsError that names this place."""
        return SettingsError(f"{self}: {message}", hint=hint)


@dataclass(frozen=True)
class Tree:
    """A value as it stands in a file: text, a list or a mapping; ``tag`` is YAML's short type name.

    A mapping holds (place of the key, value) by key.
    """

    spot: Spot
    tag: str
    value: str | list[Tree] | dict[str, tuple[Spot, Tree]]

    @property
    def kind(self) -> str:
        """What it is, for people."""
        if isinstance(self.value, str):
            return "nothing" if self.tag == "null" else f"the value {shorten(self.value)!r}"
        return "a list" if isinstance(self.value, list) else "a mapping"


def shorten(text: str) -> str:
    """Text as it may stand in a message."""
    return text if len(text) <= 80 else text[:77] + "..."


def read(path: Path, *, trusted: bool) -> Tree | None:
    """The file's mapping; None if there is no such file, or (not ``trusted``) we may not read it.

    ``trusted``: what it says is obeyed by root, so only root may be able to write it.

    Raises SettingsError.
    """
    spot = Spot(str(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise spot.error(f"cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        _check_file(os.fstat(fd), spot, trusted)
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise spot.error(f"want at most {MAX_BYTES >> 10} KiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Spot(str(path), line, 1).error(f"byte {data[error.start]:#04x} is not UTF-8") from error
    return _compose(text, str(path))


def _check_file(found: os.stat_result, spot: Spot, trusted: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise spot.error("want a regular file")
    if trusted and (found.st_uid != 0 or found.st_mode & 0o022):
        raise spot.error(
            f"owned by uid {found.st_uid}, {stat.filemode(found.st_mode)}: root obeys it, so only root may write it",
            hint=f"chown root {spot.file} && chmod go-w {spot.file}",
        )


def check_folder(path: Path) -> None:
    """Refuse a folder in which others than root may put or replace a settings file.

    A sticky one is fine: a file put there by others is theirs, which ``read`` refuses.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        raise SettingsError(
            f"{path}: owned by uid {found.st_uid}, {stat.filemode(found.st_mode)}: only root may write here",
            hint=f"chown root {path} && chmod go-w {path}",
        )


def _compose(text: str, file: str) -> Tree:
    import yaml  # 22 ms: only where there is a file

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader), file)
        node: Any = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = Spot(file, mark.line + 1, mark.column + 1) if mark else Spot(file)
        line = text.split("\n")[mark.line : mark.line + 1] if mark else []
        hint = "YAML is indented with blanks, not with tabs" if line and "\t" in line[0] else ""
        raise spot.error(f"not YAML: {error.problem or error.context}", hint) from error
    except yaml.YAMLError as error:
        raise Spot(file).error(f"not YAML: {shorten(str(error).splitlines()[0])}") from error
    if node is None or (node.id == "scalar" and node.tag == _TAG + "null"):
        return Tree(Spot(file, 1, 1), "map", {})
    tree = _tree(node, file)
    if not isinstance(tree.value, dict):
        raise tree.spot.error(f"want a mapping of KEY: VALUE lines, not {tree.kind}")
    return tree


def _check_events(events: Iterable[Any], file: str) -> None:
    """Refuse aliases (they can blow a small file up) and deep nesting.

    The parser is iterative, but libyaml's composer recurses in C and takes the process with it:
    100,000 opening brackets were a segmentation fault with PyYAML 6.0.
    """
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        spot = Spot(file, event.start_mark.line + 1, event.start_mark.column + 1)
        if kind == "AliasEvent":
            raise spot.error(f"aliases (*{event.anchor}) are not allowed here")
        if depth > _MAX_DEPTH:
            raise spot.error(f"nested deeper than {_MAX_DEPTH}")


def _tree(node: Any, file: str) -> Tree:
    spot = Spot(file, node.start_mark.line + 1, node.start_mark.column + 1)
    if node.tag not in _KNOWN_TAGS:
        raise spot.error(f"the tag {node.tag!r} is not allowed here")
    tag = node.tag.removeprefix(_TAG)
    if node.id == "scalar":
        return Tree(spot, tag, node.value)
    if node.id == "sequence":
        return Tree(spot, tag, [_tree(item, file) for item in node.value])
    items: dict[str, tuple[Spot, Tree]] = {}
    for key_node, value_node in node.value:
        key = _tree(key_node, file)
        if not isinstance(key.value, str):
            raise key.spot.error(f"want a word as key, not {key.kind}")
        if key.value in items:
            raise key.spot.error(f"key {shorten(key.value)!r} is given twice, first in line {items[key.value][0].line}")
        items[key.value] = (key.spot, _tree(value_node, file))
    return Tree(spot, tag, items)


def merge(old: Tree, new: Tree, appending: Mapping[str, Any], path: str = "") -> Tree:
    """``new`` laid over ``old``: mappings join, lists named in ``appending`` grow, the rest is replaced."""
    if isinstance(old.value, dict) and isinstance(new.value, dict):
        items = dict(old.value)
        for key, (spot, tree) in new.value.items():
            below = f"{path}.{key}" if path else key
            items[key] = (spot, merge(items[key][1], tree, appending, below) if key in items else tree)
        return Tree(new.spot, "map", items)
    if path in appending and isinstance(old.value, list) and isinstance(new.value, list):
        return Tree(old.spot, "seq", old.value + new.value)
    return new


def plain(tree: Tree) -> Any:
    """The tree as plain Python values, for the free sections of adapters."""
    if isinstance(tree.value, dict):
        return {key: plain(item) for key, (_, item) in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(item) for item in tree.value]
    text = tree.value
    if tree.tag == "null":
        return None
    if tree.tag == "bool":
        return text.lower() in ("true", "yes", "on")
    if tree.tag in ("int", "float"):
        for convert in (int, float):
            try:
                return convert(text)
            except ValueError:
                continue
    return text
