"""Reading the settings: files -> trees -> one frozen ``Settings``, every error with its place."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from wnodes_core.errors import RequestError, SettingsError
from wnodes_core.settings import source, values
from wnodes_core.settings.schema import SITE_FOLDER, Settings
from wnodes_core.settings.source import Spot, Tree

_BY_TYPE: dict[type, values.Convert] = {str: str, int: values.whole, bool: values.yes_no}
_APPENDING = ("policy",)


def load(
    path: str | Path | None = None,
    *,
    trusted: bool = False,
    environ: Mapping[str, str] | None = None,
    site_folder: str | Path = SITE_FOLDER,
) -> Settings:
    """The settings in force, checked and frozen.

    ``path``: this file and ``conf.d/*.yaml`` beside it. Else $WNODES_CONFIG in the same way. Else
    root gets ``/etc/wnodes``; an ordinary user gets ``defaults_for_user()``, over them the site's
    files as far as they are not about the node's own wnodesd, over them
    ``~/.config/wnodes/wnodes.yaml``.

    ``trusted``: for hooks, the launcher and wnodesd. Only ``path`` or ``/etc/wnodes`` counts, for
    every user alike, never the environment, and only root may be able to write it.

    Raises SettingsError with file, line and column.
    """
    environ = os.environ if environ is None else environ
    ordinary = not trusted and os.geteuid() != 0
    base = defaults_for_user(environ) if ordinary else Settings()
    chosen = path or ("" if trusted else environ.get("WNODES_CONFIG", ""))
    if chosen:
        files = [_Files(_with_fragments(Path(chosen)), required=Path(chosen))]
    else:
        # A site may keep its policy to itself; embedded runs do without.
        hidden = ordinary and not os.access(site_folder, os.R_OK | os.X_OK)
        site = [] if hidden else _with_fragments(Path(site_folder, "wnodes.yaml"))
        files = [_Files(site, site_of_user=ordinary)]
        if ordinary:
            files.append(_Files([_user_folder(environ, "XDG_CONFIG_HOME", ".config") / "wnodes.yaml"]))
    return _build_settings(base, _read_all(files, trusted=not ordinary))


def defaults_for_user(environ: Mapping[str, str] | None = None) -> Settings:
    """The defaults of a user's embedded run: folders of the user's own, nothing of the node's."""
    environ = os.environ if environ is None else environ
    settings = Settings(state_dir=f"/var/tmp/wnodes-{os.geteuid()}")
    folder = str(_user_folder(environ, "XDG_CACHE_HOME", ".cache") / "images")
    return replace(settings, images=replace(settings.images, folder=folder))


def _user_folder(environ: Mapping[str, str], variable: str, below_home: str) -> Path:
    base = environ.get(variable, "")
    if base.startswith("/"):  # the XDG specification: relative ones are to be ignored
        return Path(base, "wnodes")
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
    return Path(home, below_home, "wnodes")


@dataclass(frozen=True)
class _Files:
    """Files of one origin. ``site_of_user``: the site's files, read for a user's embedded run."""

    paths: Iterable[Path]
    required: Path | None = None
    site_of_user: bool = False


def _with_fragments(path: Path) -> list[Path]:
    folder = path.parent / "conf.d"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be read: {error.strerror}") from error
    return [path, *(folder / name for name in names if name.endswith(".yaml") and not name.startswith("."))]


def _read_all(groups: Iterable[_Files], *, trusted: bool) -> list[Tree]:
    trees = []
    for group in groups:
        for path in group.paths:
            if trusted:
                source.check_folder(path.parent)
            if group.site_of_user and not os.access(path, os.R_OK):
                continue
            tree = source.read(path, trusted=trusted)
            if tree is None and path == group.required:
                raise SettingsError(f"{path}: no such file")
            if tree is not None:
                trees.append(_without_node_only(tree) if group.site_of_user else tree)
    return trees


def _without_node_only(tree: Tree, cls: type = Settings) -> Tree:
    assert isinstance(tree.value, dict)
    items = dict(tree.value)
    for field in fields(cls):
        inner = field.default_factory
        if field.metadata.get("node_only"):
            items.pop(field.name, None)
        elif is_dataclass(inner) and field.name in items and isinstance(items[field.name][1].value, dict):
            spot, below = items[field.name]
            items[field.name] = (spot, _without_node_only(below, typing.cast(type, inner)))
    return replace(tree, value=items)


def _build_settings(base: Settings, trees: list[Tree]) -> Settings:
    if not trees:
        return base
    joined = trees[0]
    for tree in trees[1:]:
        joined = source.merge(joined, tree, dict.fromkeys(_APPENDING))
    origins: dict[str, str] = {}
    settings: Settings = _build(base, joined, "", origins)
    return replace(settings, sources=tuple(tree.spot.file for tree in trees), origins=origins)


def _build(base: Any, tree: Tree, path: str, origins: dict[str, str]) -> Any:
    """``base`` (a dataclass object) with what the tree says; notes where each value came from."""
    if not isinstance(tree.value, dict):
        raise tree.spot.error(f"{path}: want a mapping, not {tree.kind}")
    hints = typing.get_type_hints(type(base))
    known = {f.name: f for f in fields(base) if "doc" in f.metadata}
    changes = {}
    for key, (spot, item) in tree.value.items():
        below = f"{path}.{key}" if path else key
        if key not in known:
            where = f" in {path}" if path else ""
            raise spot.error(f"unknown key {source.shorten(key)!r}{where}", _nearest(key, known))
        changes[key] = _value(hints[key], known[key].metadata, item, below, origins, getattr(base, key))
        if not is_dataclass(hints[key]):
            origins[below] = f"{spot.file}:{spot.line}"
    try:
        return replace(base, **changes)
    except ValueError as error:
        raise tree.spot.error(f"{path}: {error}") from error


def _value(hint: Any, metadata: Mapping[str, Any], tree: Tree, path: str, origins: dict[str, str], old: Any) -> Any:
    if is_dataclass(hint):
        if tree.tag == "null":
            return old  # a section whose keys are all commented out
        return _build(old, tree, path, origins)
    if isinstance(hint, types.UnionType):  # "| None": not said
        hint = next(choice for choice in typing.get_args(hint) if choice is not type(None))
    if typing.get_origin(hint) is tuple:
        return _list(typing.get_args(hint)[0], metadata, tree, path, origins)
    if hint in _BY_TYPE:
        return _word(hint, metadata, tree, path)
    return _free_sections(tree, path)


def _list(inner: Any, metadata: Mapping[str, Any], tree: Tree, path: str, origins: dict[str, str]) -> tuple[Any, ...]:
    if not isinstance(tree.value, list):
        raise tree.spot.error(f"{path}: want a list, not {tree.kind}", hint="one '- VALUE' a line, or [VALUE, VALUE]")
    found = []
    for number, item in enumerate(tree.value):
        below = f"{path}[{number}]"
        if is_dataclass(inner):
            found.append(_build(typing.cast(type, inner)(), item, below, origins))
        else:
            found.append(_word(inner, metadata, item, below))
    return tuple(found)


def _word(kind: type, metadata: Mapping[str, Any], tree: Tree, path: str) -> Any:
    if not isinstance(tree.value, str) or tree.tag == "null" or not tree.value.strip():
        raise tree.spot.error(f"{path}: want a value, not {'an empty one' if tree.value == '' else tree.kind}")
    convert = metadata.get("convert") or _BY_TYPE[kind]
    try:
        return convert(tree.value.strip())
    except (ValueError, RequestError) as error:
        raise tree.spot.error(f"{path}: {source.shorten(tree.value)!r}: {error}") from error


def _free_sections(tree: Tree, path: str) -> dict[str, dict[str, Any]]:
    if not isinstance(tree.value, dict):
        raise tree.spot.error(f"{path}: want a mapping, not {tree.kind}")
    for key, (_, item) in tree.value.items():
        if not isinstance(item.value, dict) and item.tag != "null":
            raise item.spot.error(f"{path}.{key}: want a mapping, not {item.kind}")
    return {key: value or {} for key, value in source.plain(tree).items()}


def _nearest(key: str, known: Iterable[str]) -> str:
    import difflib  # only on the way to an error: 5 ms

    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def spot_of(settings: Settings, key: str) -> Spot:
    """The place of a value, for those who find it wrong later (an adapter its own section)."""
    file, _, line = settings.origins.get(key, "default").rpartition(":")
    return Spot(file, int(line), 1) if file else Spot("default")
