"""Runs an adapter's real hook scripts as its LRMS does, in the environment of its worst user."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wnodes_core import tools
from wnodes_core.testing import hookpython
from wnodes_core.testing.calls import Call, Outcome
from wnodes_core.testing.hostile import Trap
from wnodes_core.testing.standin import Daemon

NOBODY = 65534
PATIENCE_S = 60  # only so that a hook that hangs is a failure and not a night


@dataclass
class Run:
    """What one run of a hook script did."""

    exit_code: int
    stdout: str
    stderr: str
    folder: Path
    pythons: list[list[str]] = field(default_factory=list)  # the arguments of each Python it started
    modules: set[str] = field(default_factory=set)
    commands: list[list[str]] = field(default_factory=list)
    asked: list[dict[str, object]] = field(default_factory=list)  # questions to wnodesd
    trapped: str = ""

    @property
    def told(self) -> str:
        """All that somebody can have read."""
        return "\n".join([self.stdout, self.stderr, *(" ".join(argv) for argv in self.commands), *self._files()])

    def _files(self) -> list[str]:
        return [path.read_text(errors="replace") for path in self.folder.rglob("*") if path.is_file()]


class Stage:
    """One adapter's scripts, installed in a folder of their own."""

    def __init__(self, folder: Path, scripts: Path, package: str, marks: Mapping[str, str]) -> None:
        self.folder, self.package = folder, package
        self.run_dir = folder / "run"
        self.hooks = folder / "hooks"
        for path in (self.run_dir, self.hooks):
            path.mkdir(parents=True)
        self.notes = folder / "notes"
        self.python = folder / "python"
        self._install(scripts, {"@PYTHON@": str(self.python), "@RUN@": str(self.run_dir), **marks})
        self._count = 0

    def _install(self, scripts: Path, marks: Mapping[str, str]) -> None:
        for source in scripts.iterdir():
            if not source.is_file():
                continue
            text = source.read_text()
            for mark, value in marks.items():
                text = text.replace(mark, value.replace("{hooks}", str(self.hooks)))
            (self.hooks / source.name).write_text(text)
            (self.hooks / source.name).chmod(0o755)

    def _write_python(self, broken: bool) -> None:
        driver = Path(hookpython.__file__)
        words = [sys.executable, "-I", str(driver), str(self.notes), self.package if broken else ""]
        quoted = " ".join("'" + word + "'" for word in words)
        self.python.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n')
        self.python.chmod(0o755)

    def run(self, call: Call, outcome: Outcome = Outcome.GRANTED, *, folder: Path | None = None) -> Run:
        """Run a call's script to its end. ``folder``: where an earlier run of the same call was."""
        self._count += 1
        if folder is None:
            folder = self.folder / f"call{self._count}"
            folder.mkdir()
            folder.chmod(0o777)
        trap = Trap(self.folder / f"trap{self._count}")
        self._write_python(broken=outcome is Outcome.BUG)
        self.notes.write_text("")
        self.notes.chmod(0o666)
        trap.folder.chmod(0o777)
        argv, environ = call.placed(folder)
        with Daemon(self.run_dir, outcome) as daemon:
            words = [str(self.hooks / call.script), *argv]
            code = self._run(words, trap.environ(environ), call, trap.folder)
        done = Run(code, self._text("stdout"), self._text("stderr"), folder, asked=daemon.asked, trapped=trap.told())
        for line in map(json.loads, self.notes.read_text().splitlines()):
            if "argv" in line:
                done.pythons.append(line["argv"])
            else:
                done.modules |= set(line["modules"])
                done.commands += line["commands"]
        return done

    def _text(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def _run(self, argv: list[str], environ: Mapping[str, str], call: Call, cwd: Path) -> int:
        """Run with stdin as given, or closed where there is none: an LRMS may do either."""
        (self.folder / "stdin").write_bytes(call.stdin)
        with (
            open(self.folder / "stdin", "rb") as given,
            open(self.folder / "stdout", "wb") as out,
            open(self.folder / "stderr", "wb") as err,
        ):
            child = tools.spawn(
                argv,
                stdin=given.fileno(),
                stdout=out.fileno(),
                stderr=err.fileno(),
                environ=environ,
                cwd=str(cwd),
                before_exec=lambda: _settle(close=not call.stdin, user=call.as_user),
            )
            try:
                if call.endless:
                    self._hear_a_line(child)
                    child.terminate()
                return child.wait(PATIENCE_S)
            finally:
                child.kill()

    def _hear_a_line(self, child: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while "\n" not in self._text("stdout") and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)


def public_copy(folder: Path) -> Path:
    """A copy of captured files that the hooks' users can read, wherever the checkout lies; removed at our end."""
    place = Path(tempfile.mkdtemp(prefix="wnodes-captured-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    shutil.copytree(folder, place / folder.name)
    return place / folder.name


def _settle(*, close: bool, user: bool) -> None:
    if close:
        with suppress(OSError):
            os.close(0)
    if user and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
