"""A real Slurm with our hooks installed as an admin would, and a recorder in the launcher's place."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from wnodes_core.testing.site import USER, make_user, until
from wnodes_slurm import install
from wnodes_slurm.lab import Lab

__all__ = ["USER", "Cluster", "make_user", "until"]

_RECORDER = """\
#!/bin/sh
echo "$SLURM_JOB_ID|$SLURMD_NODENAME|$WNODES_ARGV0|$*" >> {record}
exec "$WNODES_ARGV0" "$@"
"""
_PYTHON = """\
#!/bin/sh
exec {python} -I {hook} {folder} "$3"
"""


class Cluster:
    """A lab with our hooks installed, and short words for what the tests do with it."""

    def __init__(self, folder: Path, hook: Path, **options: object) -> None:
        self.folder, self.hook = folder, hook
        self.record = folder / "record"
        self.state = folder / "run" / "slurm"
        self.hooks = folder / "hooks"
        self.lab = Lab(folder / "lab", prefix=f"t{os.getpid()}x", kill_wait_s=3, **options)  # type: ignore[arg-type]

    def up(self) -> Cluster:
        """Write the lab's configuration, install into it as an admin would, swap the launcher, start."""
        self.state.mkdir(parents=True)
        self.record.touch()
        self.record.chmod(0o666)
        self.lab.write()
        python = self.folder / "python"
        self._program(python, _PYTHON.format(python=sys.executable, hook=self.hook, folder=self.folder))
        site = install.Site(self.lab.conf, self.hooks, self.state.parent, str(python))
        install.build(site)
        for step in install.plan(site):
            step.apply()
        self._program(self.hooks / "launch", _RECORDER.format(record=self.record))
        self.lab.start()
        return self

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script as the test user; the job's id."""
        path = self.folder / f"job-{time.monotonic_ns()}.sh"
        self._program(path, "#!/bin/bash\n" + script)
        argv = ["sbatch", "--parsable", f"--output={self.folder}/out-%A-%a", *options, str(path)]
        return self.lab.run_as(USER, argv).text.strip()

    def show(self, job: str) -> dict[str, str]:
        """One-word fields of ``scontrol show job``."""
        text = self.lab.run(["scontrol", "-o", "show", "job", job])
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def ended(self, job: str, timeout_s: float = 30.0) -> dict[str, str]:
        """The fields of a job once it is over on every node."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
        until(lambda: self.show(job)["JobState"] in over and not self.queued(job), f"end of job {job}", timeout_s)
        return self.show(job)

    def queued(self, job: str) -> bool:
        """Whether squeue still lists it."""
        return job in self.lab.run(["squeue", "-h", "-o", "%A"]).split()

    def output(self, job: str, task: str = "4294967294") -> str:
        """What the batch script printed."""
        path = self.folder / f"out-{job}-{task}"
        return path.read_text() if path.exists() else ""

    def launched(self, job: str) -> list[str]:
        """The commands of a job that went through the launcher, as ``argv0 args``."""
        rows = (line.split("|", 3) for line in self.record.read_text().splitlines())
        return [f"{os.path.basename(row[2])} {row[3]}".strip() for row in rows if row[0] == job]

    def nodes(self) -> set[str]:
        """The states the nodes are in."""
        return set(self.lab.run(["sinfo", "-h", "-N", "-o", "%T"]).split())
