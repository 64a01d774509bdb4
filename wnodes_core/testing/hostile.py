"""The worst that users put into environments, options and texts; deterministic, so a failure repeats."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from wnodes_core.api import NativeCall
from wnodes_core.testing.calls import Call

NASTY = (
    "", " ", "\n", "\t\r\n", "-rf", "--", "-1", "0x10", "9" * 40, "../../etc/passwd", "/", "a/b", "nan",
    "'; touch told; '", '"; touch told; "', "$(touch told)", "`touch told`", "%s%n%d", "{0}{x}", "[", "]", "(((",
    "image=a,image=b", "image=", "=", ",,,", "\\", "<a>&</a>]]>", "\x1b[31m\u202e", "\udcff\udcfe", "☃" * 9, "x" * 5000,
)  # fmt: skip
HUGE = "x" * 1_000_000
_TOLD = "import os\nopen({mark!r}, 'a').write(__name__ + '\\n')\nraise ImportError(__name__)\n"
_MODULES = ("sitecustomize", "usercustomize", "wnodes_core", "json", "os", "socket", "encodings", "syslog")


def calls_like(call: Call) -> Iterator[NativeCall]:
    """The call with one thing wrong at a time: a variable gone or nasty, an argument, stdin."""
    yield call.native(environ={}, argv=(), stdin=b"")
    for name in call.environ:
        yield call.native(environ={key: text for key, text in call.environ.items() if key != name})
        yield from (call.native(environ={**call.environ, name: text}) for text in (*NASTY, HUGE))
    for index in range(len(call.argv)):
        for text in (*NASTY, HUGE):
            yield call.native(argv=(call.script, *call.argv[:index], text, *call.argv[index + 1 :]))
        yield call.native(argv=(call.script, *call.argv[:index]))
    for text in texts_like(call.stdin.decode(errors="surrogateescape")) if call.stdin else ():
        yield call.native(stdin=text.encode(errors="surrogateescape"))


def texts_like(text: str) -> Iterator[str]:
    """The text cut, doubled, stirred, with lines gone, and quite other texts."""
    yield from (*NASTY, HUGE, "\0", text * 2, text.replace("=", " = "), text.swapcase())
    yield from (text[: len(text) * part // 17] for part in range(17))
    lines = text.splitlines(keepends=True)
    yield from ("".join(lines[:index] + lines[index + 1 :]) for index in range(min(len(lines), 60)))
    dice = random.Random(4)  # noqa: S311 - any numbers, the same each time
    for _ in range(40):
        signs = list(text)
        for _ in range(1 + len(signs) // 40):
            signs[dice.randrange(len(signs) or 1) : 0] = dice.choice(NASTY)
        yield "".join(signs)


class Trap:
    """A folder whose files tell when somebody imports or sources them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = folder / "TOLD"
        folder.mkdir()
        for name in _MODULES:
            (folder / f"{name}.py").write_text(_TOLD.format(mark=str(self.mark)))
        (folder / "profile").write_text(f"echo profile >> '{self.mark}'\n")

    def environ(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """What the LRMS gives, without a PATH, and all that a user could add to it."""
        trap = str(self.folder)
        poison = {
            "LD_PRELOAD": f"{trap}/absent.so",
            "LD_LIBRARY_PATH": trap,
            "BASH_ENV": f"{trap}/profile",
            "ENV": f"{trap}/profile",
            "PYTHONPATH": trap,
            "PYTHONHOME": trap,
            "PYTHONSTARTUP": f"{trap}/os.py",
            "PYTHONINSPECT": "1",
            "PYTHONWARNINGS": "error",
            "HOME": trap,
            "IFS": "/",
            "CDPATH": trap,
            "LANG": "xx_XX",
        }
        huge = {f"WNODES_CONTRACT_{number}": "y" * 100_000 for number in range(8)}
        return {name: text for name, text in {**poison, **huge, **wanted}.items() if name != "PATH"}

    def told(self) -> str:
        """What was imported or sourced: '' is wanted."""
        return self.mark.read_text() if self.mark.exists() else ""
