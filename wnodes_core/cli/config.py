"""``wnodes config``: is the configuration right, and what does it come to?"""

from __future__ import annotations

import argparse
import json
from typing import Any

from wnodes_core import settings
from wnodes_core.cli import output, parsers


def add_parser(subparsers: Any) -> None:
    """Add ``config`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "config",
        None,
        about=parsers.COMMANDS["config"][1],
        text="Read /etc/wnodes/wnodes.yaml and conf.d/*.yaml beside it (an ordinary user's own file over them) as\n"
        "every part of wnodes does. An error names file, line, column and, for a misspelt key, the nearest one.",
        examples="""
        wnodes config check                  # before restarting wnodesd
        wnodes config check new.yaml         # before installing a file
        wnodes config show --json""",
    )
    group = parsers.add_group(parser)
    check = parsers.add_command(
        group,
        "check",
        _check,
        about="say whether the settings are valid; exit code 1 if not",
        text="Read the settings and say which files they come from, or what is wrong with the first bad value.",
        examples="wnodes config check\nwnodes config check ./wnodes.yaml",
    )
    show = parsers.add_command(
        group,
        "show",
        _show,
        about="print every setting in force and where it comes from",
        text="Print every key, its value and FILE:LINE, or 'default'.",
        examples="wnodes config show\nwnodes config show --yaml  # as one file that says it all",
    )
    show.add_argument("--yaml", action="store_true", help="print one YAML file that gives the same settings")
    for command in (check, show):
        command.add_argument("file", nargs="?", metavar="FILE", help="this file and conf.d beside it, instead")
        parsers.add_json(command)


def _check(args: argparse.Namespace) -> int:
    found = settings.load(args.file)
    if args.json:
        output.print_json({"ok": True, "sources": list(found.sources)})
    elif found.sources:
        print("\n".join(f"ok  {output.clean(source)}" for source in found.sources))
    else:
        print("ok  no file: every setting has its default")
    return 0


def _show(args: argparse.Namespace) -> int:
    from wnodes_core.settings import show

    found = settings.load(args.file)
    rows = show.rows(found)
    if args.yaml:
        print(show.dump(found), end="")
    elif args.json:
        values = [{"key": row.key, "value": row.value, "origin": row.origin} for row in rows]
        output.print_json({"sources": list(found.sources), "settings": values})
    else:
        output.print_table(["KEY", "VALUE", "ORIGIN"], [(row.key, _word(row.value), row.origin) for row in rows])
    return 0


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return (json.dumps(value) if value else "-") if isinstance(value, dict) else str(value)
