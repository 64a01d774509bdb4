"""``wnodes plugin new``: begin a plug-in of your own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wnodes_core import scaffold
from wnodes_core.cli import parsers


def add_parser(subparsers: Any) -> None:
    """Add ``plugin`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "plugin",
        None,
        about=parsers.COMMANDS["plugin"][1],
        text="Begin a plug-in of your own: a package that works and is tested against the contract.",
        examples="""
        wnodes plugin new flux --kind lrms
        wnodes plugin new tape --kind image --folder ~/src/wnodes-tape""",
    )
    group = parsers.add_group(parser)
    new = parsers.add_command(
        group,
        "new",
        _new,
        about="write a new package",
        text="Write a package with a plug-in that does something, its pyproject.toml, and tests that inherit the\n"
        "contract of its kind. It passes them as it is; make it yours from there.",
        examples="""
        wnodes plugin new chem --kind policy
        pip install ./wnodes-chem && wnodes plugins  # it is found
        python -m pytest wnodes-chem  # and keeps the contract""",
    )
    new.add_argument("name", metavar="NAME", help="small letters and digits; the package is wnodes_NAME")
    kinds = "; ".join(f"{kind}: {about}" for kind, about in scaffold.KINDS.items())
    new.add_argument("--kind", required=True, choices=list(scaffold.KINDS), help=kinds)
    new.add_argument("--folder", type=Path, metavar="PATH", help="where to (default: wnodes-NAME here)")


def _new(args: argparse.Namespace) -> int:
    folder = args.folder or Path(f"wnodes-{args.name}")
    for path in scaffold.write(args.name, args.kind, folder):
        print(path)
    print(f"next: pip install {folder}; python -m pytest {folder}; wnodes plugins")
    return 0
