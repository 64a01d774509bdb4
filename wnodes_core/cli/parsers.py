"""The tree of parsers: the table of commands, built-in and of adapters, and the frame of a command.

A command's module has ``add_parser(subparsers)``; its handlers are ``func(args) -> int``. Adapters
add theirs by an entry point in the group ``wnodes.cli`` that names such a module.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from wnodes_core import __version__

CLI_GROUP = "wnodes.cli"
# Name: (module, one line for the list of commands). Modules are imported when their name is typed.
COMMANDS = {
    "run": ("wnodes_core.cli.run", "run a command in its own VM"),
    "image": ("wnodes_core.cli.image", "images on this node: add, pull, list, show, tag, verify, rm, purge"),
    "lease": ("wnodes_core.cli.lease", "VMs of running jobs: list, show, trace, console, release"),
    "template": ("wnodes_core.cli.template", "booted guests that VMs are cloned from: list, build, remove"),
    "plugins": ("wnodes_core.cli.plugins", "list the plug-ins and adapters that are installed"),
    "plugin": ("wnodes_core.cli.plugin", "begin a plug-in of your own"),
    "doctor": ("wnodes_core.cli.doctor", "check this node and say what to do about each finding"),
    "config": ("wnodes_core.cli.config", "check or show the settings"),
    "completion": ("wnodes_core.cli.completion", "print a completion script for a shell"),
}
_EPILOG = """\
examples:
  wnodes run --image debian12 -- uname -a
  wnodes image list
  wnodes lease list
  wnodes doctor

exit codes:
  0 done, 1 an error to be looked at, 2 wrong usage, 69 this node cannot,
  70 a bug of ours, 75 try again later, 130 interrupted, 141 nobody reads our output;
  wnodes run ends as the command in the guest did, or with 125

environment:
  WNODES_CONFIG  settings file to read instead of /etc/wnodes/wnodes.yaml
  WNODES_DEBUG   1 prints a traceback with every error
  WNODES_TRACE   1 prints every call of a plug-in
  NO_COLOR       not empty: no colours
"""

Handler = Callable[[argparse.Namespace], int]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, option help from one column on."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):  # the commands alone, without a line "COMMAND"
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def add_command(subparsers: Any, name: str, handler: Handler | None, *, about: str, text: str, examples: str) -> Any:
    """A subcommand in our frame: ``about`` is its line in a list, ``text`` its description.

    ``examples`` are lines of command and, after two blanks and ``#``, what it does.
    """
    lines = "".join(f"  {line.strip()}\n" for line in examples.strip().splitlines())
    parser = subparsers.add_parser(
        name, help=about, description=text, epilog=f"examples:\n{lines}", formatter_class=Formatter, allow_abbrev=False
    )
    if handler:
        parser.set_defaults(func=handler)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs; its keys are stable")


def add_group(parser: argparse.ArgumentParser) -> Any:
    """The subcommands of a command; one is required."""
    return parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND", title="commands")


def build(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this command line: the command that is named in full, the others by name only.

    Raises BrokenPlugin if an adapter's command cannot be loaded.
    """
    parser, subparsers = _top()
    name = next((word for word in words if not word.startswith("-")), "")
    if name in COMMANDS:
        importlib.import_module(COMMANDS[name][0]).add_parser(subparsers)
        return parser
    adapters = _adapter_commands()
    if name in adapters:
        adapters[name](subparsers)
        return parser
    for command, (_, about) in COMMANDS.items():
        subparsers.add_parser(command, help=about)
    for command in sorted(adapters):
        subparsers.add_parser(command, help="command of an adapter")
    if name:
        parser.error(f"no command {name!r}: {_wish(name, [*COMMANDS, *adapters])}")
    return parser


def build_all() -> argparse.ArgumentParser:
    """The parser with every built-in command, for completion and the reference page."""
    parser, subparsers = _top()
    for module, _ in COMMANDS.values():
        importlib.import_module(module).add_parser(subparsers)
    return parser


def _top() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="wnodes",
        description="Any batch job in its own virtual machine.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wnodes {__version__}")
    return parser, parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")


def _adapter_commands() -> dict[str, Callable[[Any], None]]:
    from importlib.metadata import entry_points  # 40 ms: only for a name that is not ours

    return {entry.name: _adder(entry) for entry in entry_points(group=CLI_GROUP)}


def _adder(entry: Any) -> Callable[[Any], None]:
    def add(subparsers: Any) -> None:
        from wnodes_core.errors import BrokenPlugin

        try:
            entry.load().add_parser(subparsers)
        except Exception as error:  # noqa: BLE001 - a stranger's import may raise anything
            raise BrokenPlugin(f"command {entry.name!r} of {entry.value}: {type(error).__name__}: {error}") from error

    return add


def _wish(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"want one of {', '.join(known)}"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """The parser's subcommands in order, each with its one line of help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (sub, helps.get(name, "")) for name, sub in action.choices.items()}
    return {}


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The parser's options and arguments, without ``--help`` and the list of subcommands."""
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    return [a for a in parser._actions if not isinstance(a, left_out) and a.help != argparse.SUPPRESS]
