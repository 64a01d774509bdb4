"""A whole site for tests: a real Slurm, wnodesd, our hooks installed, the small image in the store.

Nothing is a fake here. Folders lie in /var/tmp, which ordinary users can traverse.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from wnodes_slurm import install
from wnodes_slurm.lab import Lab

from wnodes_core import command
from wnodes_core.model import Image
from wnodes_core.testing import site
from wnodes_core.testing.site import IMAGES, SHARED, add_image, text_of, until

__all__ = ["IMAGES", "OVER", "SHARED", "Site", "add_image", "until"]

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")


class Site(site.Site):
    """``with Site(image, prefix="a") as site:`` - up in about two seconds, down without a trace.

    ``settings`` is further YAML for wnodes.yaml, ``build`` when it makes templates (``SHARED``:
    it clones what all such sites have); everything else goes to ``Lab``.
    """

    lrms = "slurm"

    def __init__(self, image: Image, prefix: str, *, settings: str = "", build: str = "never", **lab: Any) -> None:
        super().__init__(image)
        lab = {"kill_wait_s": 5, "memory_mib": 6000, "mem_per_cpu_mib": 800, **lab}
        self.lab = Lab(self.folder / "lab", prefix=prefix, **lab)
        self.configure(settings=settings, build=build, SLURM_CONF=self.lab.conf)

    def raise_lrms(self) -> None:
        """Slurm, with our hooks in its configuration before it starts."""
        self.lab.write()
        where = install.Site(self.lab.conf, self.folder / "hooks", self.folder / "run", sys.executable)
        install.build(where)
        for step in install.plan(where):
            step.apply()
        self.start_wnodesd()
        self.lab.start()

    def end_lrms(self) -> None:
        """All of Slurm's daemons."""
        self.lab.down()

    # jobs

    def submit(self, script: str, *options: str, image: str = "debian12") -> str:
        """Submit a batch script as the user, in the work folder; the job's id."""
        path = self.work / f"job{time.monotonic_ns()}.sh"
        path.write_text("#!/bin/bash\n" + script)
        path.chmod(0o755)
        vm = [f"--vm-image={image}"] if image else []
        argv = ["sbatch", "--parsable", "--output=out-%A-%a", *vm, *options, str(path)]
        return self.run_as(argv).text.strip()

    def run_as(self, argv: list[str], *, check: bool = True, timeout_s: float = 180) -> command.Result:
        """Run a command as the user in the work folder. Raises CommandError."""
        return self.lab.run_as(self.user, argv, cwd=str(self.work), check=check, timeout_s=timeout_s)

    def show(self, job: str) -> dict[str, str]:
        """One-word fields of ``scontrol show job``."""
        text = self.lab.run(["scontrol", "-o", "show", "job", job])
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def show_text(self, job: str) -> str:
        """All of ``scontrol show job``."""
        return self.lab.run(["scontrol", "-o", "show", "job", job])

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, str]:
        """The fields of a job once it is over on every node."""
        until(lambda: self.show(job)["JobState"] in OVER, f"end of job {job}: {self.show(job)}", timeout_s)
        until(
            lambda: job not in self.lab.run(["squeue", "-h", "-o", "%A"]).split(),
            f"end of job {job} in squeue",
            timeout_s,
        )
        return self.show(job)

    def output(self, job: str, task: str = "4294967294") -> str:
        """What the batch script printed."""
        return text_of(self.work / f"out-{job}-{task}")

    def nodes(self) -> set[str]:
        """The states the nodes are in."""
        return set(self.lab.run(["sinfo", "-h", "-N", "-o", "%T"]).split())

    def assert_nothing_left(self, timeout_s: float = 20.0) -> None:
        """No lease, process, folder, marker or journal of any job remains; the nodes are not drained."""
        super().assert_nothing_left(timeout_s)
        assert not {state for state in self.nodes() if "drain" in state or "down" in state}, self.nodes()
