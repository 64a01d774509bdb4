"""HTCondor: a real one, a partitionable slot of two cpus. The user's folder is mounted beside the sandbox, VMs are clones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrms import Ask, End, Lrms, Refused
from wnodes_htcondor.testing import SHARED, Site

from wnodes_core.errors import CommandError
from wnodes_core.model import Image


class Htcondor(Lrms):
    """A job is one proc of a vanilla cluster."""

    name, title = "htcondor", "HTCondor 23.9"
    cannot = {"signal sent": "HTCondor sends a job no signal but the one that ends it"}

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.site = Site(image, build=SHARED, cpus=2, kill_wait_s=5)

    @property
    def work(self) -> Path:
        return self.site.work

    def __enter__(self) -> Htcondor:
        self.site.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.site.__exit__()

    def submit(self, ask: Ask) -> str:
        lines = [f'vm = "mount={self.work},start={ask.start}"', 'environment = "K_PROC=$(ProcId)"', f"request_memory = {ask.memory_mib or 700}"]
        lines += [f"allowed_execute_duration = {ask.time_s}"] if ask.time_s else []
        lines += [f"input = {ask.stdin}"] if ask.stdin else []
        script = "K_INDEX=$((K_PROC + 1))\n" + ask.text(self.work)
        try:
            return self.site.submit(script, *lines, image=ask.image, count=ask.count)
        except CommandError as error:
            raise Refused(error.stderr_tail) from error

    def cancel(self, job: str) -> None:
        self.site.run_as(["condor_rm", job], check=False)

    def requeue(self, job: str) -> None:
        self.site.run_as(["condor_vacate_job", job])

    def elements(self, job: str, count: int) -> list[str]:
        return [f"{job}.{number}" for number in range(count)]

    def end(self, job: str) -> End:
        fields = self.site.ended(job, 400)
        state = self.site.state(job)
        if state == "HELD":
            return End(f"HELD {fields['HoldReasonCode']}/{fields['HoldReasonSubCode']}")
        if state != "COMPLETED":
            return End(state)
        code = self.site.exit_code(job)
        return End(f"{state}, code {code}", code) if code >= 0 else End(f"{state}, signal {-code}", signal=-code)

    def output(self, job: str) -> bytes:
        cluster, _, proc = job.partition(".")
        path = self.work / f"out-{cluster}-{proc or 0}"
        return path.read_bytes() if path.exists() else b""

    def said(self, job: str) -> str:
        return f"{self.site.errors(job.partition('.')[0])}\n{self.site.hold_reason(job)}"

    def lease(self, job: str) -> dict[str, Any]:
        return self.site.lease(job)

    def queued(self, job: str) -> bool:
        return self.site.state(job) == "IDLE"

    def left(self) -> list[str]:
        return self.site.left()
