"""The pool: a job that takes a clone that waited, beside one that clones and one that boots; what waiting costs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

from figure import Figure
from ground import image, one_guest, slurm_site

from wnodes_core import processes

ROUNDS, STARTS, COLD, COUNT = 4, 3, 2, 3
BASE_MIB = 512
OPTIONS = ("--mem=1200",)
DEADLINE_S = 120.0
_UIDS = range(90000, 90016)
_WARM = f"on_use\n  base_memory_mib: {BASE_MIB}\n"
_POOL = f"  pool_uids: 90000-90015\n  pool:\n    - image: debian12\n      count: {COUNT}\n"


def measure() -> Iterator[Figure]:
    """Seconds from LAUNCH called to the user's first instruction, by the traces of jobs of a real Slurm; TCG."""
    with one_guest(), slurm_site(image("minimal"), "o", build=_WARM + _POOL) as site:
        _fill(site)
        private, guests = _private_mib()
        with_pool = site.config.read_text()
        found: dict[str, list[float]] = {"pool": [], "warm": [], "cold": []}
        for _ in range(ROUNDS):
            _set(site, with_pool)
            _fill(site)
            found["pool"] += _starts(site, "pool", STARTS)
            _set(site, with_pool.replace(_POOL, ""))
            found["warm"] += _starts(site, "warm", STARTS)
        found["cold"] = _starts(site, "cold", COLD, "--vm-start=cold")
        yield from _figures(found, private, guests)


def _figures(found: dict[str, list[float]], private: float, guests: int) -> Iterator[Figure]:
    pool, warm, cold = (statistics.median(found[kind]) for kind in ("pool", "warm", "cold"))
    ratio = pool / warm
    note = (
        f"median of {len(found['pool'])}, in turn by {STARTS}: {pool * 1000:.0f} ms against {warm * 1000:.0f} ms, and "
        f"{cold:.2f} s cold; LAUNCH called → first instruction under Slurm, the job's folder mounted; what is left of "
        "both: launcher, mount, first command in an emulated guest"
    )
    yield Figure("pool hit against a clone", ratio, "×", "≤ 0.5", ratio <= 0.5, note)
    rate = 1 / pool
    note = f"one after the other, a start of {pool * 1000:.0f} ms; the guest's own work under TCG is the limit"
    yield Figure("start rate from the pool", rate, "per s", "≥ 5", rate >= 5, note)
    share = private / BASE_MIB
    note = (
        f"{private:.0f} MiB for each of {guests}: QEMU, warden and keeper together (smaps_rollup, Private_*); "
        f"guest of {BASE_MIB} MiB; QEMU's translation buffer is part of it under TCG"
    )
    yield Figure("private memory of a slot that waits, of its guest's RAM", share, "", "≤ 0.10", share <= 0.1, note)


def _set(site: Any, text: str) -> None:
    site.config.write_text(text)
    site.daemon.send_signal(signal.SIGHUP)
    _until(lambda: site.log().count("settings read again") >= 1 and (("pool_uids" in text) or not _vms()))


def _fill(site: Any) -> None:
    _until(lambda: len(_vms()) >= COUNT and len(_waiting(site)) == COUNT)
    time.sleep(1.0)  # what fills them comes to rest


def _until(true: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the pool is not as it should be within {DEADLINE_S:g} s")
        time.sleep(0.05)


def _waiting(site: Any) -> list[Any]:
    return [p for p in processes.table() if p.parent == site.daemon.pid and "wnodes_core.pool.keeper" in p.command]


def _vms() -> list[Any]:
    return [p for p in processes.table() if p.uid in _UIDS and "qemu" in os.path.basename(p.command[0])]


def _starts(site: Any, kind: str, count: int, *options: str) -> list[float]:
    found = []
    for _ in range(count):
        job = site.submit("true\n", *OPTIONS, *options)
        fields, lease = site.ended(job), site.lease(job)
        if fields["JobState"] != "COMPLETED" or lease["start"]["kind"] != kind:
            raise RuntimeError(f"job {job}: {fields['JobState']}, {lease['start']}: want {kind}: {site.log()[-500:]}")
        first = next(step for step in lease["trace"] if step[0] == "first instruction")
        found.append(first[1] + first[2])
    return found


def _private_mib() -> tuple[float, int]:
    """Of all that a slot has, for each slot."""
    vms = _vms()
    parents = {each.parent for each in processes.table() if each.uid in _UIDS}
    pids = {each.pid for each in processes.table() if each.uid in _UIDS} | (parents - {1})
    return sum(map(_private_of, pids)) / len(vms), len(vms)


def _private_of(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    print(json.dumps([figure.to_dict() for figure in measure()], indent=1, ensure_ascii=False))
