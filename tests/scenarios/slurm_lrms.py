"""Slurm: a real one, one node of two cpus, cgroup tracking and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrms import Ask, End, Lrms, Refused
from slurm_site import Site, until

from wnodes_core.errors import CommandError
from wnodes_core.model import Image


class Slurm(Lrms):
    """A job is a batch script."""

    name, title = "slurm", "Slurm 22.05"

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.site = Site(image, "c", cgroup=True, cpus=2, kill_wait_s=4)

    @property
    def work(self) -> Path:
        return self.site.work

    def __enter__(self) -> Slurm:
        self.site.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.site.__exit__()

    def submit(self, ask: Ask) -> str:
        options = ["-n1", "--error=err-%A-%a", f"--vm-start={ask.start}"]
        options += [f"--mem={ask.memory_mib}"] if ask.memory_mib else []
        options += [f"--input={ask.stdin}"] if ask.stdin else []
        options += ["--time=1"] if ask.time_s else []
        options += [f"--array=1-{ask.count}"] if ask.count > 1 else []
        script = "K_INDEX=$SLURM_ARRAY_TASK_ID\n" + ask.text(self.work)
        try:
            return self.site.submit(script, *options, image=ask.image)
        except CommandError as error:
            raise Refused(error.stderr_tail) from error

    def cancel(self, job: str) -> None:
        self.site.run_as(["scancel", job], check=False)

    def signal(self, job: str, name: str) -> None:
        self.site.run_as(["scancel", "--batch", f"--signal={name}", job])

    def requeue(self, job: str) -> None:
        """Slurm waits two minutes before it starts a requeued job; an admin need not.

        Not while other jobs start: slurmd 22.05 forgets the first run only where it has not looked for such records in
        the last two seconds, and else runs no Prolog for the second, which then fails closed ("this node prepared none").
        So it is held meanwhile: on a busy machine the others take longer than the two minutes.
        """
        self.site.run_as(["scontrol", "requeuehold", job])
        queue = ["squeue", "--noheader", "--format=%A %T"]
        left = lambda: f"end of all other jobs: {self.site.lab.run(queue)}"  # noqa: E731
        until(lambda: self.site.lab.run(queue).split() == [job, "PENDING"], left, 300)

        def started() -> bool:
            try:
                self.site.lab.run(["scontrol", "release", job])
                self.site.lab.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"])
            except CommandError:
                return False  # still completing
            return True

        until(started, f"start time of {job}", 60)

    def hurry(self, job: str) -> None:
        self.site.lab.run(["scontrol", "update", f"jobid={job}", "EndTime=now+1"])

    def elements(self, job: str, count: int) -> list[str]:
        return [f"{job}_{index}" for index in range(1, count + 1)]

    def end(self, job: str) -> End:
        fields = self.site.ended(job, 400)
        code, _, number = fields["ExitCode"].partition(":")
        native = f"{fields['JobState']} {fields['ExitCode']}"
        return End(native, int(code) if number == "0" else None, int(number) or None)

    def output(self, job: str) -> bytes:
        return self._read("out", job)

    def said(self, job: str) -> str:
        shown = self.site.lab.run(["scontrol", "-o", "show", "job", job], check=False)
        return self._read("err", job).decode(errors="replace") + shown.partition("AdminComment=")[2]

    def _read(self, kind: str, job: str) -> bytes:
        number, _, index = job.partition("_")
        path = self.work / f"{kind}-{number}-{index or 4294967294}"
        return path.read_bytes() if path.exists() else b""

    def lease(self, job: str) -> dict[str, Any]:
        return self.site.lease(self.site.show(job)["JobId"] if "_" in job else job)

    def about(self, job: str) -> str:
        logs = [line for path in (self.site.folder / "lab/log").glob("slurm*.log") for line in path.read_text().splitlines()]
        daemon = [line for line in self.site.log().splitlines() if f'-{job}"' in line or f"-{job}-" in line]
        mine = [line for line in logs if f"JobId={job}" in line or f" {job}" in line]
        return "\n".join([self.said(job)[-1000:], *mine[-40:], *daemon[-15:]])

    def queued(self, job: str) -> bool:
        return self.site.show(job)["JobState"] == "PENDING"

    def left(self) -> list[str]:
        return self.site.left() + [state for state in self.site.nodes() if state not in ("idle",)]
