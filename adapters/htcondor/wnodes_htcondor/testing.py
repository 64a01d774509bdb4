"""A whole site for tests: a real HTCondor, wnodesd, our hooks installed, an image in the store.

Nothing is a fake here. Folders lie in /var/tmp, which ordinary users can traverse. The words are
those of the Slurm site's: ``submit``, ``ended``, ``output``, ``wait_running``, ``assert_nothing_left``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from wnodes_core import command
from wnodes_core.model import Image
from wnodes_core.testing import site
from wnodes_core.testing.site import IMAGES, SHARED, USER, add_image, make_user, text_of, until
from wnodes_htcondor import install
from wnodes_htcondor.lab import Lab

__all__ = ["IMAGES", "SHARED", "STATES", "USER", "Site", "add_image", "make_user", "until"]

SUBMIT = """\
executable = {script}
output = out-$(ClusterId)-$(ProcId)
error = err-$(ClusterId)-$(ProcId)
log = log-$(ClusterId)
should_transfer_files = YES
request_cpus = 1
request_memory = 800
request_disk = 10MB
{more}
queue {count}
"""
# JobStatus, from the HTCondor manual's appendix "Job ClassAd Attributes"
STATES = {1: "IDLE", 2: "RUNNING", 3: "REMOVED", 4: "COMPLETED", 5: "HELD", 6: "TRANSFERRING_OUTPUT", 7: "SUSPENDED"}


class Site(site.Site):
    """``with Site(image) as site:`` - up in a few seconds, down without a trace.

    ``release`` is HTCondor's (``23``, ``25``), ``settings`` further YAML for wnodes.yaml, ``build``
    when templates are made, ``condor`` further lines of HTCondor's configuration, read before ours;
    everything else goes to ``Lab``.
    """

    lrms = "htcondor"

    def __init__(
        self,
        image: Image,
        *,
        settings: str = "",
        build: str = "never",
        condor: str = "",
        release: str = "23",
        **lab: Any,
    ) -> None:
        super().__init__(image)
        self.lab = Lab(self.folder / "lab", release=release, **lab)
        self.condor = condor
        path = self.lab.environ["PATH"]
        self.configure(settings=settings, build=build, CONDOR_CONFIG=self.lab.conf, PATH=path)

    def raise_lrms(self) -> None:
        """HTCondor, with our hooks in its configuration before it starts; up once its slots say that they have us."""
        self.lab.write()
        (self.lab.config_d / "50-site.conf").write_text(self.condor)
        for step in install.plan(self.site()):
            step.apply()
        self.start_wnodesd()
        self.lab.start()
        until(lambda: "true" in self.slots("HasWnodes"), lambda: f"HasWnodes; {self.lab.log('StartLog')}", 30)

    def end_lrms(self) -> None:
        """All of HTCondor's daemons."""
        self.lab.down()

    def site(self) -> install.Site:
        """What ``wnodes htcondor install`` would work on."""
        config, version = install.ask(self.lab.environ)
        where = {"prefix": self.folder / "hooks", "run_dir": self.folder / "run", "python": sys.executable}
        return install.Site(config, version, period_s=2, vms=self.lab.cpus, **where)  # type: ignore[arg-type]

    def lease_job(self, job: str) -> str:
        """A cluster's id means its first job."""
        return job if "." in job else f"{job}.0"

    # jobs

    def submit(
        self, script: str, *lines: str, image: str = "debian12", count: int = 1, shebang: str = "#!/bin/bash"
    ) -> str:
        """Submit a script as the user, in the work folder; ``lines`` go into the submit file. The cluster's id."""
        name = f"job{time.monotonic_ns()}"
        path = self.work / f"{name}.sh"
        path.write_text(f"{shebang}\n{script}")
        path.chmod(0o755)
        vm = [f"vm_image = {image}"] if image else []
        text = SUBMIT.format(script=path, more="\n".join([*vm, *lines]), count=count)
        (self.work / f"{name}.sub").write_text(text)
        return self.run_as(["condor_submit", "-terse", f"{name}.sub"]).text.split(".")[0].strip()

    def run_as(self, argv: list[str], *, check: bool = True, timeout_s: float = 180) -> command.Result:
        """Run a command as the user in the work folder. Raises CommandError."""
        return self.lab.run_as(self.user, argv, cwd=str(self.work), check=check, timeout_s=timeout_s)

    def show(self, job: str) -> dict[str, Any]:
        """The job's ad, from the queue or from history; {} if neither knows it."""
        words = [job if "." in job else f"{job}.0", "-json"]
        for argv in (["condor_q", "-all", *words], ["condor_history", *words]):
            text = self.lab.run(argv, check=False)
            if text.strip().startswith("["):
                found = json.loads(text)
                if found:
                    return dict(found[0])
        return {}

    def state(self, job: str) -> str:
        """One of ``STATES``' words, or ''."""
        return STATES.get(self.show(job).get("JobStatus", 0), "")

    def until_state(self, job: str, *states: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job's ad once it is in one of these states."""
        what = f"{'/'.join(states)} of job {job}"
        until(lambda: self.state(job) in states, lambda: f"{what}: {self.about(job)}", timeout_s)
        return self.show(job)

    def about(self, job: str) -> str:
        """The part of its ad that tells why, and wnodesd's last words."""
        fields = self.show(job)
        kept = {name: fields.get(name) for name in ("JobStatus", "HoldReason", "NumShadowStarts", "VacateReason")}
        return f"{kept} {self.log()[-1500:]}"

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job's ad once it is over: completed, removed or held."""
        return self.until_state(job, "COMPLETED", "REMOVED", "HELD", timeout_s=timeout_s)

    def output(self, job: str, proc: int = 0) -> str:
        """What the job printed on stdout."""
        return text_of(self.work / f"out-{job}-{proc}")

    def errors(self, job: str, proc: int = 0) -> str:
        """What the job, and we, printed on stderr."""
        return text_of(self.work / f"err-{job}-{proc}")

    def exit_code(self, job: str) -> int:
        """The job's exit code; minus the signal that ended it."""
        fields: Mapping[str, Any] = self.show(job)
        return -int(fields["ExitSignal"]) if fields.get("ExitBySignal") else int(fields["ExitCode"])

    def hold_reason(self, job: str) -> str:
        """Why the job is held, or ''."""
        return str(self.show(job).get("HoldReason", ""))

    def slots(self, attribute: str) -> set[str]:
        """The values that the slots of the machine show of an attribute."""
        return set(self.lab.run(["condor_status", "-af", attribute], check=False).split())

    def remove_all(self) -> None:
        """Remove every job and wait until the queue is empty: for a test that follows one that failed."""
        self.lab.run(["condor_rm", "-all"], check=False)
        left = ["condor_q", "-all", "-af", "ClusterId"]
        until(lambda: not self.lab.run(left, check=False).strip(), "empty queue", 60)

    # what is left

    def left(self) -> list[str]:
        """Sandboxes of HTCondor's too."""
        execute = self.folder / "lab/execute"
        return super().left() + ([str(each) for each in execute.iterdir()] if execute.exists() else [])
