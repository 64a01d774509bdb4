"""The part of LIM that an elim talks to: runs every elim, merges what they print, checks requirements with it."""

from __future__ import annotations

import fcntl
import glob
import os
import re
from contextlib import suppress
from typing import Any

from wnodes_lsf.simulator.conf import Conf

BUILT_IN = frozenset(
    {"mem", "swp", "tmp", "ut", "pg", "io", "ls", "it", "r15s", "r1m", "r15m", "ncpus", "type", "model", "local", "any"}
)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Lim:
    """Resources of this host. Each elim prints ``N name value [name value ...]`` lines for ever (D/T)."""

    def __init__(self, conf: Conf) -> None:
        self.values: dict[str, float] = {}
        self._pipes: dict[int, bytes] = {}
        # Runs as the LIM's user: the LSF administrator, on T root.
        for path in sorted(glob.glob(f"{conf.serverdir}/elim*")):
            self._pipes[_start(path, conf)] = b""
        shared = f"{conf.envdir}/lsf.shared"
        text = open(shared).read() if os.path.exists(shared) else ""  # noqa: SIM115 - read once
        block = re.search(r"(?ms)Begin Resource\s*$(.*?)^\s*End Resource", text)
        rows = [line.split() for line in (block[1] if block else "").splitlines()]
        self.names = {row[0] for row in rows if row and not row[0].startswith(("#", "RESOURCENAME"))}

    def read(self) -> None:
        """Take in what the elims have printed meanwhile; what is no report is dropped."""
        for fd in self._pipes:
            with suppress(BlockingIOError):
                self._pipes[fd] += os.read(fd, 65536)
            *lines, self._pipes[fd] = self._pipes[fd].split(b"\n")
            for line in lines:
                self.values |= _report(line.decode(errors="replace"), self.names)

    def problem(self, requirement: str) -> str:
        """The first unknown name in select[] or rusage[], or ''."""
        words = {
            word for text in re.findall(r"(?:select|rusage)\[([^\]]*)\]", requirement) for word in _WORD.findall(text)
        }
        unknown = sorted(words - self.names - BUILT_IN)
        return f"unknown resource {unknown[0]}" if unknown else ""

    def fits(self, requirement: str, running: list[dict[str, Any]]) -> bool:
        """Whether select[NAME>NUMBER …] holds, rusage of what runs taken off what the elim reports (T)."""
        for name, least in re.findall(r"(\w+)>(\d+)", " ".join(re.findall(r"select\[([^\]]*)\]", requirement))):
            if name not in self.names:
                continue
            taken = sum(_rusage(job["options"].get("RES_REQ", ""), name) for job in running)
            if self.values.get(name, 0.0) - taken <= float(least):
                return False
        return True


def _start(path: str, conf: Conf) -> int:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(writer, 1)
        os.closerange(3, 256)
        os.execve(path, [path], {"PATH": "/bin:/usr/bin:/sbin:/usr/sbin", "LSF_ENVDIR": conf.envdir})
    os.close(writer)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK)
    return reader


def _report(line: str, names: set[str]) -> dict[str, float]:
    words = line.split()
    if not words or not words[0].isdecimal() or len(words) != 1 + 2 * int(words[0]):
        return {}
    found = {}
    for name, value in zip(words[1::2], words[2::2], strict=True):
        with suppress(ValueError):
            found[name] = float(value)
    return {name: value for name, value in found.items() if name in names}


def _rusage(requirement: str, name: str) -> float:
    match = re.search(rf"rusage\[[^\]]*\b{re.escape(name)}=(\d+)", requirement)
    return float(match[1]) if match else 0.0
