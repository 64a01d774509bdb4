"""Plays a page of the docs: writes its files, types its commands, compares what they print.

A fence after a line ```` `PATH`: ```` is a file, after ```` `PATH`, further: ```` its next part. A fence ``console`` is a shell's
session: ``$`` begins a command, ``>`` goes on with it, the rest is what it prints, where ``…`` stands for anything. A
second word names when it is played (``console guest``).
"""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_FENCE = re.compile(r"(?ms)^```([^\n]*)\n(.*?)^```$")
_FILE = re.compile(r"^`([\w./-]+)`[^\n]*:\n\n\Z", re.MULTILINE)
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Block:
    """One fence: its language, when it is played, its text, the file it is (part of)."""

    language: str
    when: str
    text: str
    path: str = ""
    further: bool = False
    line: int = 0


def blocks(page: str) -> Iterator[Block]:
    """The fences of a page, in order."""
    text = (DOCS / page).read_text()
    for match in _FENCE.finditer(text):
        language, _, when = match[1].partition(" ")
        before = text[: match.start()]
        named = _FILE.search(before.rstrip("\n").rpartition("\n\n")[2] + "\n\n")
        further = bool(named and "further" in named[0])
        yield Block(language, when, match[2], named[1] if named else "", further, before.count("\n") + 1)


class Shell:
    """One bash for a whole page."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        argv = ["bash", "--noprofile", "--norc"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(argv, cwd=folder, env=dict(environ), start_new_session=True, **pipes)

    def type(self, command: str) -> tuple[str, int]:
        """What a command prints, and its exit code."""
        end = f"--end-{time.monotonic_ns()}--"
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{command}\nprintf '\\n%s %s\\n' '{end}' $?\n".encode())
        self.process.stdin.flush()
        said, deadline = b"", time.monotonic() + PATIENCE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not (match := re.search(rb"\n" + end.encode() + rb" (\d+)\n", said)):
                assert selector.select(deadline - time.monotonic()), f"no end of: {command}\n{said.decode()}"
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"the shell ended in: {command}\n{said.decode()}"
                said += data
        return said[: match.start()].decode(errors="replace"), int(match[1])

    def close(self) -> None:
        """End the shell; what it started in the background gets its SIGTERM."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"kill $(jobs -p) 2>/dev/null; wait\nexit\n")
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.process.wait()


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block and what each shall print."""
    for part in re.split(r"(?m)^\$ ", text)[1:]:
        lines = part.splitlines()
        count = next((i for i, line in enumerate(lines) if i and not line.startswith("> ") and line != ">"), len(lines))
        command = "\n".join([lines[0], *(line[2:] for line in lines[1:count])])
        yield command, "\n".join(lines[count:])


def matches(said: str, wanted: str) -> bool:
    """Whether a command printed what the page says; columns may be wider."""
    said, wanted = (re.sub(r"[ \t]+", " ", text).strip() for text in (said, wanted))
    pattern = ".*".join(re.escape(part) for part in wanted.split("…"))
    return re.fullmatch(pattern, said, re.DOTALL) is not None


def play(page: str, folder: Path, environ: Mapping[str, str], *, when: str = "") -> None:
    """Play a page in an empty folder; blocks of another occasion than ``when`` are left out."""
    shell = Shell(folder, environ)
    try:
        for block in blocks(page):
            if block.when not in ("", when):
                continue
            if block.path:
                _write(folder / block.path, block)
            elif block.language == "console":
                _type(shell, block, page)
    finally:
        shell.close()


def _write(path: Path, block: Block) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a" if block.further else "w") as file:
        file.write("\n\n" + block.text if block.further else block.text)


def _type(shell: Shell, block: Block, page: str) -> None:
    for command, wanted in sessions(block.text):
        said, code = shell.type(command)
        told = f"docs/{page}, block at line {block.line}: $ {command}\nprinted:\n{said}\nthe page says:\n{wanted}"
        assert matches(said, wanted), told
        assert code == 0, f"exit code {code}: {told}"
