"""A whole site for tests: the simulator of LSF, wnodesd, our hooks installed as an admin would, an image.

But for LSF nothing is a fake. Folders lie in /var/tmp, which ordinary users can traverse.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from wnodes_core import command
from wnodes_core.model import Image
from wnodes_core.testing import site
from wnodes_core.testing.site import IMAGES, SHARED, USER, add_image, make_user, text_of, until
from wnodes_lsf import install
from wnodes_lsf.simulator import lab

__all__ = ["IMAGES", "OVER", "SHARED", "USER", "Site", "add_image", "make_user", "until"]

OVER = ("DONE", "EXIT")


class Site(site.Site):
    """``with Site(image) as site:`` - up in about two seconds, down without a trace.

    ``settings`` is further YAML for wnodes.yaml, ``build`` when it makes templates, ``more_queues`` further
    blocks of lsb.queues, ``queue`` lines that replace or join those of the VM queue; the rest goes to ``Lab``
    (``release="T"`` or ``"D"``, options of lsf.conf). Job ids are ``"101"``, or ``"101[2]"`` for an
    element of an array.
    """

    lrms = "lsf"

    def __init__(
        self,
        image: Image | None,
        *,
        settings: str = "",
        build: str = "never",
        queue: Mapping[str, str] | None = None,
        more_queues: str = "",
        **options: Any,
    ) -> None:
        super().__init__(image)
        options = {"JOB_TERMINATE_INTERVAL": 4, "LSB_SIM_MINUTE": 1, "LSB_SIM_RUNLIMIT_GRACE": 4, **options}
        self.lab = lab.Lab(self.folder / "lsf", queues=lab.QUEUES + more_queues, **options)
        self.generic = options.get("release", "T") == "T"
        self.queue_lines = dict(queue or {})
        path = f"{self.lab.bindir}:{command.PATH}"
        self.configure(settings=settings, build=build, PATH=path, LSF_ENVDIR=self.lab.envdir)
        self.node = os.uname().nodename.split(".")[0]  # as leases of this site name it

    def raise_lrms(self) -> None:
        """The simulator, with our hooks in its configuration before it starts."""
        self.lab.write()
        self.install()
        self.start_wnodesd()
        self.lab.start()

    def end_lrms(self) -> None:
        """All of the simulator's daemons."""
        self.lab.down()

    def lease_job(self, job: str) -> str:
        """An array's element is ``101_2`` there."""
        return job.replace("[", "_").rstrip("]")

    def install(self, **more: Any) -> None:
        """Connect wnodes to the cluster, as ``wnodes lsf install --apply`` does."""
        where = (self.lab.serverdir, self.lab.envdir / "lsb.queues", self.folder / "hooks", self.folder / "run")
        given = {"slots": False, "generic": self.generic, **more}
        for step in install.plan(install.Site(*where, sys.executable, **given)):
            step.apply()
        path = self.lab.envdir / "lsb.queues"
        text = path.read_text()
        for key, value in self.queue_lines.items():
            text = re.sub(rf"(?m)(QUEUE_NAME = vm\n(?:(?!End Queue).*\n)*?){key} = .*\n", r"\1", text)
            text = text.replace("QUEUE_NAME = vm\n", f"QUEUE_NAME = vm\n{key} = {value}\n")
        path.write_text(text)

    def about(self, job: str) -> str:
        """All that helps to see what went wrong."""
        logs = {name: self.lab.log(name)[-1500:] for name in ("sbatchd", "mbatchd")}
        return f"{self.show(job)} output {self.output(job)[-1500:]!r} wnodesd {self.log()[-3000:]} {logs}"

    # jobs

    def submit(self, script: str, *options: str, image: str = "debian12", **how: Any) -> str:
        """``bsub < script`` as the user, in the work folder; the job's id."""
        return self.bsub([*options], image=image, stdin=("#!/bin/bash\n" + script).encode(), **how)

    def bsub(self, argv: Sequence[str], *, image: str = "debian12", **how: Any) -> str:
        """``bsub`` with these words (options, a command); the job's id. Raises CommandError."""
        vm = ["-a", f"wnodes(image={image})"] if image else []
        done = self.run_as(["bsub", *vm, "-o", "out-%J-%I", *argv], **how)
        match = re.search(r"Job <(\d+)>", done.text)
        assert match, done
        return match[1]

    def run_as(self, argv: Sequence[str], *, timeout_s: float = 180, **how: Any) -> command.Result:
        """Run a command as the user in the work folder; ``environ`` is added to theirs. Raises CommandError."""
        return self.lab.run_as(self.user, list(argv), cwd=str(self.work), timeout_s=timeout_s, **how)

    def show(self, job: str) -> dict[str, str]:
        """The job as bjobs shows it: ``stat``, ``exit_code``, ``queue``, ``exec_host``, …"""
        fields = "jobid jobindex stat user queue exec_host job_name exit_code slots"
        records = json.loads(self.lab.run(["bjobs", "-u", "all", "-a", "-json", "-o", fields, job]).text)["RECORDS"]
        return {name.lower(): value for name, value in records[0].items()}

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, str]:
        """The job once it is over."""
        until(lambda: self.show(job)["stat"] in OVER, lambda: f"end of job {job}: {self.about(job)}", timeout_s)
        return self.show(job)

    def output(self, job: str) -> str:
        """What the job printed."""
        number, _, index = job.partition("[")
        return text_of(self.work / f"out-{number}-{index.rstrip(']') or 0}")
