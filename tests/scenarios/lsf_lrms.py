"""LSF: the simulator of its protocol, with our hooks as an admin installs them; the VMs are real, and clones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrms import Ask, End, Lrms, Refused
from wnodes_lsf.testing import SHARED, Site

from wnodes_core.errors import CommandError
from wnodes_core.model import Image


class Lsf(Lrms):
    """A job is a script that bsub reads. Its minutes are seconds."""

    name, title = "lsf", "LSF (simulator)"

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.site = Site(image, build=SHARED, LSB_SIM_SLOTS=2)

    @property
    def work(self) -> Path:
        return self.site.work

    def __enter__(self) -> Lsf:
        self.site.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.site.__exit__()

    def submit(self, ask: Ask) -> str:
        options = ["-e", "err-%J-%I"]
        options += ["-W", str(ask.time_s)] if ask.time_s else []
        options += ["-i", str(ask.stdin)] if ask.stdin else []
        options += ["-J", f"{ask.key}[1-{ask.count}]"] if ask.count > 1 else []
        memory = f",memory={ask.memory_mib - 320}M" if ask.memory_mib else ",memory=512M"  # LSF's own limit is not told
        try:
            script = "K_INDEX=$LSB_JOBINDEX\n" + ask.text(self.work)
            return self.site.submit(script, *options, image=f"{ask.image}{memory},start={ask.start}")
        except CommandError as error:
            raise Refused(error.stderr_tail) from error

    def cancel(self, job: str) -> None:
        self.site.run_as(["bkill", job], check=False)

    def signal(self, job: str, name: str) -> None:
        self.site.run_as(["bkill", "-s", name, job])

    def requeue(self, job: str) -> None:
        self.site.run_as(["brequeue", job])

    def elements(self, job: str, count: int) -> list[str]:
        return [f"{job}[{index}]" for index in range(1, count + 1)]

    def end(self, job: str) -> End:
        shown = self.site.ended(job, 400)
        code = int(shown["exit_code"] or 0)
        return End(f"{shown['stat']} {code}", code)

    def output(self, job: str) -> bytes:
        return self._read("out", job)

    def said(self, job: str) -> str:
        return self._read("err", job).decode(errors="replace")

    def _read(self, kind: str, job: str) -> bytes:
        number, _, index = job.partition("[")
        path = self.work / f"{kind}-{number}-{index.rstrip(']') or 0}"
        return path.read_bytes() if path.exists() else b""

    def lease(self, job: str) -> dict[str, Any]:
        return self.site.lease(job)

    def queued(self, job: str) -> bool:
        return self.site.show(job)["stat"] == "PEND"

    def left(self) -> list[str]:
        return self.site.left()
