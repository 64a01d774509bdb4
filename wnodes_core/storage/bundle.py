"""sshfs for a guest that has none: the host's own, with its libraries and its loader.

An ordinary cloud image carries no sshfs, and the guest may have no network to install it from.
Run through its own loader the program depends on nothing of the guest's user space.
"""

from __future__ import annotations

import base64
import functools
import os
import re
from typing import Any

from wnodes_core.errors import CommandError, NoProvider
from wnodes_core.tools import run

FOLDER = "/usr/lib/wnodes/tools"
PROGRAM = "/usr/bin/sshfs"
_LIBRARY = re.compile(r"^\s*(?:(\S+) => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_LOADER = re.compile(rb"/lib[^\0]{0,80}/ld-linux[^\0]{0,40}\.so\.\d+")


def argv() -> list[str]:
    """How the guest calls the uploaded sshfs; its arguments follow."""
    return [f"{FOLDER}/loader", "--library-path", FOLDER, f"{FOLDER}/sshfs"]


def parse_libraries(text: str) -> dict[str, str]:
    """Name and path of each library that the loader's ``--list`` prints.

    >>> parse_libraries(" linux-vdso.so.1 (0x7ff)\\n libc.so.6 => /lib/libc.so.6 (0x7f0)\\n /lib64/ld.so (0x7f1)")
    {'libc.so.6': '/lib/libc.so.6'}
    """
    return {name: path for name, path in _LIBRARY.findall(text) if name}


@functools.cache
def tools_bundle() -> tuple[tuple[str, str, bytes], ...]:
    """Name, host path and content of all that the guest needs.

    Raises NoProvider where the host has no sshfs either.
    """
    try:
        program = _read(PROGRAM)
        found = _LOADER.search(program)
        if not found:
            raise NoProvider(f"{PROGRAM}: want a dynamically linked program of glibc")
        loader = found[0].decode()
        libraries = parse_libraries(run([loader, "--list", PROGRAM]).text)
    except (OSError, CommandError) as error:
        hint = "install sshfs on the host, or in the image"
        raise NoProvider(f"the guest has no sshfs and neither has the host: {error}", hint=hint) from error
    paths = {"sshfs": PROGRAM, "loader": loader, **libraries}
    return tuple((name, path, _read(path)) for name, path in paths.items())


def knows(option: bytes) -> bool:
    """Whether the uploaded sshfs has an option."""
    return option in tools_bundle()[0][2]


def files() -> list[dict[str, Any]]:
    """The bundle as the guest's agent takes it: ``path``, ``content`` in base64, ``mode``."""
    return [
        {"path": f"{FOLDER}/{name}", "content": base64.b64encode(content).decode(), "mode": 0o755}
        for name, _, content in tools_bundle()
    ]


def _read(path: str) -> bytes:
    with open(os.path.realpath(path), "rb") as file:
        return file.read()
