"""A Slurm job with a VM beside the same job without, from submission to its end."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from figure import Figure
from ground import image, one_guest, slurm_site

PAIRS = 4
SCRIPT = "echo done\n"
OPTIONS = ("--cpus-per-task=2", "--mem=1200")


def measure() -> list[Figure]:
    """One figure: what the VM adds; of the VM jobs the phases are shown too."""
    with one_guest(), slurm_site(image("minimal"), "b") as site:
        _job(site, "debian12")  # libvirt learns the host, the page cache fills
        vm, bare, traces = [], [], []
        for number in range(PAIRS):
            for name in ("debian12", "") if number % 2 == 0 else ("", "debian12"):
                seconds, trace = _job(site, name)
                (vm if name else bare).append(seconds)
                if trace:
                    traces.append(trace)
    added = statistics.median(a - b for a, b in zip(vm, bare, strict=True))
    last = ", ".join(f"{step} {seconds:.2f}" for step, _, seconds in traces[-1])
    note = (
        f"{statistics.median(vm):.2f} s against {statistics.median(bare):.2f} s, "
        f"`sbatch` called → job out of `squeue`, {PAIRS} pairs, 2 cpus; "
        f"phases of the last: {last}; limit: the guest's own boot"
    )
    return [Figure("Slurm job with a VM minus the same job without", added, "s", "", None, note)]


def _job(site: Any, name: str) -> tuple[float, list[tuple[str, float, float]]]:
    began = time.perf_counter()
    job = site.submit(SCRIPT, *OPTIONS, image=name)
    fields = site.ended(job)
    seconds = time.perf_counter() - began
    if fields["JobState"] != "COMPLETED":
        raise RuntimeError(f"job {job} with image {name!r}: {fields['JobState']}: {site.output(job)[-500:]}")
    return seconds, site.lease(job).get("trace", []) if name else []


if __name__ == "__main__":
    print(json.dumps([figure.to_dict() for figure in measure()], indent=1, ensure_ascii=False))
