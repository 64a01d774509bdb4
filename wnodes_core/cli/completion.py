"""``wnodes completion``: completion scripts, made from the parsers themselves.

A script is one function that follows the words typed so far down the tree of commands and offers
the words that may follow; where nothing of ours fits, the shell goes on with file names.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from wnodes_core.cli import parsers


def add_parser(subparsers: Any) -> None:
    """Add ``completion`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "completion",
        _print,
        about=parsers.COMMANDS["completion"][1],
        text="Print a script that completes commands and options of wnodes.",
        examples="""
        wnodes completion bash > /etc/bash_completion.d/wnodes
        wnodes completion zsh > /usr/local/share/zsh/site-functions/_wnodes
        wnodes completion fish > ~/.config/fish/completions/wnodes.fish""",
    )
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell to print it for")


@dataclass(frozen=True)
class _Place:
    """The words that may follow after a path of commands, each with its help."""

    path: str
    words: tuple[tuple[str, str], ...]


def _print(args: argparse.Namespace) -> int:
    print(SHELLS[args.shell](list(_places(parsers.build_all(), ""))), end="")
    return 0


def _places(parser: argparse.ArgumentParser, path: str) -> Iterator[_Place]:
    below = parsers.subcommands(parser)
    words = [(name, about) for name, (_, about) in below.items()]
    for action in parsers.options(parser):
        words += [(option, action.help or "") for option in action.option_strings if option.startswith("--")]
        if not action.option_strings and action.choices:
            words += [(str(choice), "") for choice in action.choices]
    yield _Place(path, (*words, ("--help", "show help and exit")))
    for name, (subparser, _) in below.items():
        yield from _places(subparser, f"{path} {name}".strip())


def _bash(places: list[_Place]) -> str:
    paths = "|".join(f'"{place.path}"' for place in places if place.path)
    cases = "".join(f'        "{place.path}") words="{" ".join(w for w, _ in place.words)}" ;;\n' for place in places)
    return f"""\
# bash completion for wnodes; made by: wnodes completion bash
_wnodes() {{
    local at="" try word words=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [ "$word" = -- ] && return
        try="${{at:+$at }}$word"
        case "$try" in
            {paths}) at="$try" ;;
        esac
    done
    case "$at" in
{cases}    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}")
}}
complete -o default -F _wnodes wnodes
"""


def _zsh(places: list[_Place]) -> str:
    paths = "|".join(f'"{place.path}"' for place in places if place.path)
    cases = ""
    for place in places:
        items = " ".join(shlex.quote(f"{word}:{about}" if about else word) for word, about in place.words)
        cases += f'        "{place.path}") offers=({items}) ;;\n'
    return f"""\
#compdef wnodes
# zsh completion for wnodes; made by: wnodes completion zsh
_wnodes() {{
    local at="" try word
    local -a offers
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        [[ "$word" == -- ]] && {{ _normal; return; }}
        try="${{at:+$at }}$word"
        case "$try" in
            {paths}) at="$try" ;;
        esac
    done
    case "$at" in
{cases}    esac
    _describe wnodes offers || _files
}}
compdef _wnodes wnodes
"""


def _fish(places: list[_Place]) -> str:
    paths = " ".join(f"'{place.path}'" for place in places if place.path)
    lines = ""
    for place in places:
        for word, about in place.words:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            told = f" -d {_fish_quote(about)}" if about else ""
            lines += f"complete -c wnodes -n '__wnodes_at \"{place.path}\"' {what}{told}\n"
    return f"""\
# fish completion for wnodes; made by: wnodes completion fish
function __wnodes_at
    set -l at ''
    for word in (commandline -opc)[2..]
        set -l try (string trim "$at $word")
        contains -- "$try" {paths}; and set at $try
    end
    test "$at" = "$argv[1]"
end
{lines}"""


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[list[_Place]], str]] = {"bash": _bash, "fish": _fish, "zsh": _zsh}
