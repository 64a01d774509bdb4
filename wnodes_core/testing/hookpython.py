"""The Python of hook scripts under test: runs what the script asks of Python and writes down what it did.

``python -I hookpython.py NOTES ADAPTER -I -c CODE …``: one JSON line in NOTES at the start (the arguments)
and one at the end (modules loaded, commands run instead of which nothing ran). ADAPTER is the package
that shall be broken (outcome BUG), or ''.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_commands: list[list[str]] = []


class _Broken:
    """Finds the adapter's plug-in and fails: a half-done upgrade, a syntax error."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Importlib's question; only the broken package gets an answer."""
        if name.startswith(f"{self.package}."):
            raise RuntimeError(f"{name} is broken (contract)")


def _note(path: str, **what: Any) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def _watch(notes: str) -> None:
    """Note the end, however the program ends, and every command that it would have run."""
    leave = os._exit

    def noted(code: int) -> Any:
        _note(notes, modules=sorted(sys.modules), commands=_commands)
        leave(code)

    os._exit = noted  # type: ignore[assignment]
    from wnodes_core import command

    def run(argv: Any, **how: Any) -> Any:
        environ = command.clean_environment() if how.get("environ") is None else how["environ"]
        poisoned = sorted(name for name in environ if name.startswith(("LD_", "PYTHON", "BASH_")) or name == "ENV")
        _commands.append([*argv, *(f"POISONED {name}" for name in poisoned)])
        return command.Result(tuple(argv), 0, b"", b"")

    command.run = run


def main(argv: list[str]) -> None:
    """As Python would: ``-I -c CODE ARGS``, ``-I -m MODULE ARGS`` or ``-I FILE ARGS``."""
    notes, broken, *words = argv[1:]
    _note(notes, argv=words)
    if broken:
        sys.meta_path.insert(0, _Broken(broken))
    isolated = [word for word in words[:1] if word == "-I"]
    words = words[len(isolated) :]
    _watch(notes)
    try:
        _run(words)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    except BaseException:  # noqa: BLE001 - as the interpreter does: traceback and 1
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _run(words: list[str]) -> None:
    import runpy

    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<hook>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        with open(words[0], encoding="utf-8") as file:
            exec(compile(file.read(), words[0], "exec"), {"__name__": "__main__", "__file__": words[0]})


if __name__ == "__main__":
    main(sys.argv)
