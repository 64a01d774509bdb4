"""``wnodes plugins``: what is installed, where it comes from, and whether it works."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from wnodes_core import settings
from wnodes_core.cli import output, parsers
from wnodes_core.plugins import LRMS_GROUP, Found, Plugins

_DISABLED = "disabled by the settings"


def add_parser(subparsers: Any) -> None:
    """Add ``plugins`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "plugins",
        _list,
        about=parsers.COMMANDS["plugins"][1],
        text="List built-in plug-ins, those of other packages (entry points 'wnodes.plugins') and adapters\n"
        "('wnodes.lrms'). Exit code 1 if one is broken.",
        examples="""
        wnodes plugins
        wnodes plugins --json
        WNODES_TRACE=1 wnodes run --image debian12 -- true  # see each call of a plug-in""",
    )
    parsers.add_json(parser)


def _list(args: argparse.Namespace) -> int:
    found = [("plug-in", plugin) for plugin in Plugins(disabled=settings.load().plugins.disabled).found]
    found += [("adapter", adapter) for adapter in _adapters()]
    if args.json:
        keys = ("name", "origin", "api_level", "problem")
        output.print_json([{"kind": kind, **{key: getattr(one, key) for key in keys}} for kind, one in found])
    else:
        rows = [(one.name, kind, one.origin, one.api_level or "-", one.problem or "ok") for kind, one in found]
        output.print_table(["NAME", "KIND", "ORIGIN", "API", "STATE"], rows)
    return int(any(one.problem not in ("", _DISABLED) for _, one in found))


def _adapters() -> Iterator[Found]:
    """Each installed adapter, loaded the way its hooks would; no other road finds its faults."""
    from importlib.metadata import entry_points

    for entry in sorted(entry_points(group=LRMS_GROUP), key=lambda entry: entry.name):
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "?"
        try:
            loaded = Plugins(lrms=entry.name, builtins=(), scan=False).found
            level = next((one.api_level for one in loaded if one.name == entry.name), None)
            yield Found(entry.name, origin, level)
        except Exception as error:  # noqa: BLE001 - a stranger's import may raise anything
            yield Found(entry.name, origin, None, str(getattr(error, "message", error)))
