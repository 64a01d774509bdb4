"""The reference pages that are made from the code: ``python -m wnodes_core.cli.reference [FOLDER]``.

Writes ``cli.md``, ``settings.md`` and ``wnodes.yaml.example`` into FOLDER (default ``docs``), and brings the
facts in its ``hooks.md`` up to date. Tests compare what lies there with what this makes. argparse's own
help is not used, because its wording changes from one Python to the next.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from wnodes_core.cli import hookreference, parsers
from wnodes_core.settings import show

_HEAD = """\
# The `wnodes` command

Made from the parsers by `python -m wnodes_core.cli.reference`; a test compares it. Adapters bring a command of
their own (`wnodes slurm`), which their own page describes.
"""


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {
        "cli.md": _HEAD + "".join(_sections(parsers.build_all(), "", "wnodes")),
        "settings.md": show.reference(),
        "wnodes.yaml.example": show.example(),
    }


def _sections(parser: argparse.ArgumentParser, about: str, name: str) -> Iterator[str]:
    yield f"\n{'#' * min(4, 1 + len(name.split()))} {name}\n\n"
    yield f"```\n{_usage(parser, name)}\n```\n"
    yield f"\n{(parser.description or about).strip()}\n"
    below = parsers.subcommands(parser)
    if below:
        yield "\n| command | |\n|---|---|\n"
        yield from (f"| `{name} {word}` | {_cell(told)} |\n" for word, (_, told) in below.items())
    arguments = [a for a in parsers.options(parser) if a.help]
    if arguments:
        yield "\n| option | |\n|---|---|\n"
        yield from (f"| `{_cell(_spelt(a))}` | {_cell(a.help or '')} |\n" for a in arguments)
    if parser.epilog:
        yield f"\n```\n{parser.epilog.rstrip()}\n```\n"
    for word, (subparser, told) in below.items():
        yield from _sections(subparser, told, f"{name} {word}")


def _usage(parser: argparse.ArgumentParser, name: str) -> str:
    if parsers.subcommands(parser):
        return f"{name} COMMAND ..."
    positional = [_bracketed(a) for a in parsers.options(parser) if not a.option_strings]
    optional = any(a.option_strings for a in parsers.options(parser))
    return " ".join([name, *(["[OPTION ...]"] if optional else []), *positional])


def _bracketed(action: argparse.Action) -> str:
    word = _value(action)
    if action.nargs == "?":
        return f"[{word}]"
    if action.nargs == "*":
        return f"[{word} ...]"
    return f"{word} [{word} ...]" if action.nargs == "+" else word


def _spelt(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    value = "" if action.nargs == 0 else f" {_value(action)}"
    return ", ".join(option for option in action.option_strings) + value


def _value(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|")


def main(argv: list[str]) -> int:
    """Write the pages."""
    folder = Path(argv[0] if argv else "docs")
    hooks = folder / "hooks.md"
    made = {**pages(), hooks.name: hookreference.page(hooks.read_text(encoding="utf-8"))} if hooks.exists() else pages()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
