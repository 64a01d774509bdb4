"""What our hooks add to a job that wants no VM, beside the cost of starting Python at all."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from figure import Figure, in_turn, median_ratio

HOOKS = Path(__file__).parent.parent / "hooks" / "slurm"
RUNS = 60
ORDINARY = {"SLURM_JOB_ID": "1", "SLURM_JOB_UID": "1000", "SLURMD_NODENAME": "n0", "SLURM_CONF": "/dev/null"}


def measure() -> list[Figure]:
    """Prolog and Epilog for an ordinary job, each beside ``python3 -I -c pass``."""
    return [_one(name) for name in ("prolog", "epilog")]


def _one(name: str) -> Figure:
    text = (HOOKS / name).read_text().replace("@PYTHON@", sys.executable).replace("@RUN@", "/run/wnodes")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, name)
        script.write_text(text)
        script.chmod(0o755)
        hook, bare = in_turn(lambda: _run([str(script)]), lambda: _run(["/usr/bin/python3", "-I", "-c", "pass"]), RUNS)
    ratio = median_ratio(hook, bare)
    ms = [statistics.median(seconds) * 1e3 for seconds in (hook, bare)]
    note = f"{ms[0]:.1f} ms against {ms[1]:.1f} ms, {RUNS} pairs; floor: one start of dash"
    title = f"Slurm {name}, job without a VM, against `python3 -I -c pass`"
    return Figure(title, ratio, "×", "≤ 1.5", ratio <= 1.5, note)


def _run(argv: list[str]) -> None:
    subprocess.run(argv, env=ORDINARY, check=True, stdin=subprocess.DEVNULL, cwd=os.sep)
