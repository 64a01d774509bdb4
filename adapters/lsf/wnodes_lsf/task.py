"""What the launcher must know of an LSF job. No imports but light ones.

Contract: the queue says ``JOB_STARTER = exec .../launch '%USRCMD'``; LSF pastes the user's command
between the quotes as it is, so it arrives as one argument. ``bsub < script`` arrives as the
literal text ``$LSB_JOBFILENAME.shell``, which no shell has expanded within single quotes.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from typing import NamedTuple

from wnodes_core.errors import BadRequest

SCRIPT = "$LSB_JOBFILENAME.shell"
HOST_COMMANDS = ("bjobs", "bhosts", "bqueues", "bhist", "bpeek", "bpost", "bread", "lsload", "lshosts")
EXIT_AGAIN = 122  # in the queue's REQUEUE_EXIT_VALUES: wnodesd wants the job run anew


class Task(NamedTuple):
    """One job: argv and environment in the guest, its request, and how its launcher is to treat it."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    carried: tuple[str, ...]
    request: str
    host_commands: tuple[str, ...] = HOST_COMMANDS
    leader_signals: frozenset[int] = frozenset()
    exit_again: int = EXIT_AGAIN


def read_task(argv: tuple[str, ...], environ: Mapping[str, str]) -> Task:
    """The job that LSF meant to run.

    >>> read_task(("/l", "a; b"), {"WNODES_REQUEST": "image=x"})[:4]
    (('/bin/sh', '-c', 'a; b'), {}, (), 'image=x')
    >>> read_task(("/l", "--b64 ZWNobyAnYSBiJw=="), {}).argv
    ('/bin/sh', '-c', "echo 'a b'")

    Raises BadRequest if the queue's JOB_STARTER line is not ours.
    """
    if len(argv) != 2:
        wish = f"JOB_STARTER = exec {argv[0]} '%USRCMD'"
        raise BadRequest(f"{len(argv) - 1} arguments, {' '.join(argv[1:])[:200]!r}: want one, by {wish}")
    own = {name: value for name, value in environ.items() if name != "WNODES_REQUEST"}
    request, text = environ.get("WNODES_REQUEST", ""), argv[1].strip()
    if text == SCRIPT or (text.endswith(".shell") and text == f"{environ.get('LSB_JOBFILENAME')}.shell"):
        path = f"{environ.get('LSB_JOBFILENAME', '')}.shell"
        return Task(_script(path), own, (path,), request)
    if text.startswith("--b64 "):
        text = _decoded(text[6:])
    return Task(("/bin/sh", "-c", text), own, (), request)


def _script(path: str) -> tuple[str, ...]:
    """A script with a first line of its own is run by that, any other by sh, as LSF's job file would."""
    try:
        with open(path, "rb") as file:
            return (path,) if file.read(2) == b"#!" else ("/bin/sh", path)
    except OSError as error:
        raise BadRequest(f"script {path!r}: {error.strerror}: want the one that bsub spooled") from error


def _decoded(text: str) -> str:
    try:
        return os.fsdecode(base64.b64decode(text.strip(), validate=True))
    except binascii.Error as error:
        raise BadRequest(f"--b64 {text[:60]!r}: {error}") from error
