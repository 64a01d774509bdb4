"""What the launcher must know of a Slurm task. No imports but the standard library's lightest.

Contract (Slurm 22.05): our SPANK plug-in's task_init swapped argv[0] for the launcher and left
the old one in WNODES_ARGV0; from 23.11 on spank_prepend_task_argv put ``launcher --`` in front.
The batch script lies in SlurmdSpoolDir, which no guest sees, and is carried along at its path.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import NamedTuple

HOST_COMMANDS = ("srun", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "sstat", "sacct", "sprio", "sattach")


class Task(NamedTuple):
    """One task: its own argv and environment, and how its launcher is to treat it."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    carried: tuple[str, ...]
    host_commands: tuple[str, ...]
    leader_signals: frozenset[int]


def read_task(argv: tuple[str, ...], environ: Mapping[str, str]) -> Task:
    """The task that Slurm meant to run.

    >>> read_task(("/l", "-n"), {"WNODES_ARGV0": "/bin/echo", "A": "1"})[:2]
    (('/bin/echo', '-n'), {'A': '1'})
    >>> read_task(("/l", "--", "/bin/echo", "-n"), {}).argv
    ('/bin/echo', '-n')

    Raises ValueError if neither form is there (somebody called the launcher by hand).
    """
    own = {name: value for name, value in environ.items() if name != "WNODES_ARGV0"}
    if "WNODES_ARGV0" in environ:
        words = (environ["WNODES_ARGV0"], *argv[1:])
    elif len(argv) > 2 and argv[1] == "--":
        words = argv[2:]
    elif len(argv) > 1:
        words = argv[1:]  # wnodes-run CMD in a script, where no plug-in can be compiled
    else:
        raise ValueError("no command")
    batch = "SLURM_PROCID" in environ and os.path.basename(words[0]) == "slurm_script"
    # `scancel -b -s USR1` means the batch shell alone; a step's signal means all its processes.
    leader = frozenset({signal.SIGUSR1, signal.SIGUSR2}) if batch else frozenset()
    return Task(words, own, (words[0],) if batch else (), HOST_COMMANDS, leader)
