"""Warm start: clones of a template beside cold starts, beside plain QEMU restoring the same state, and many at once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figure import Figure
from ground import Ground, ground, image, one_guest

STARTS = 100
COLD = {"cloud": 2, "minimal": 3}
MEMORY_MIB = {"cloud": 1024, "minimal": 512}
FLOORS = 20
CROWD = (1, 10, 25, 50, 100)
CROWD_MIB = 768
DEADLINE_S = 300.0
FLOOR = Path(__file__).with_name("warm_floor.py")


def measure() -> Iterator[Figure]:
    """Figures of the issue's list; TCG, one vCPU, no mount, first byte of ``echo`` on the host."""
    with one_guest(), ground("minimal", "cloud") as place:
        own_templates(place)
        for kind in ("minimal", "cloud"):
            yield from _kind(place, kind)
        yield from _crowd(place)


def own_templates(place: Ground) -> None:
    """Templates are kept where the user may make them."""
    folder = place.folder / "templates"
    folder.mkdir()
    os.chown(folder, place.user.pw_uid, place.user.pw_gid)
    with open(place.config, "a") as file:
        file.write(f"warm:\n  folder: {folder}\n")


def _kind(place: Ground, kind: str) -> Iterator[Figure]:
    cold = [first_byte(place, kind, "cold") for _ in range(COLD[kind])]
    build = first_byte(place, kind, "warm")
    warm = sorted(first_byte(place, kind, "auto") for _ in range(STARTS))
    floor = _floor(place, kind)
    p50, p99 = statistics.median(warm), warm[int(len(warm) * 0.99)]
    ratio = p50 / statistics.median(cold)
    note = (
        f"p50 of {STARTS} starts {p50 * 1000:.0f} ms against {statistics.median(cold):.2f} s, {len(cold)} cold starts; "
        f"`wnodes run` called → first byte of echo; the template took {build:.1f} s to build, once"
    )
    goal = ("≤ 0.02", ratio <= 0.02) if kind == "cloud" else ("", None)
    yield Figure(f"warm start against cold, {kind} image", ratio, "×", *goal, note)
    tail = p99 / p50
    yield Figure(
        f"warm start p99 against p50, {kind} image",
        tail,
        "×",
        "≤ 2",
        tail <= 2,
        f"p99 {p99 * 1000:.0f} ms, n = {STARTS}",
    )
    limit = 1.5 * floor["restore"] + floor["channel"]
    note = (
        f"{p50 * 1000:.0f} ms against 1.5 × {floor['restore'] * 1000:.0f} ms (plain QEMU loads the "
        f"same state and runs, median of {FLOORS}) + {floor['channel'] * 1000:.0f} ms (that guest wakes and "
        f"runs `true` over the channel)"
    )
    yield Figure(f"warm start against its floor, {kind} image", p50 / limit, "×", "≤ 1", p50 <= limit, note)


def first_byte(place: Ground, kind: str, start: str) -> float:
    """Seconds from ``wnodes run`` called to the first byte of its command."""
    vm = f"image={image(kind).name},memory={MEMORY_MIB[kind]}M,start={start}"
    argv = place.argv("run", "-q", "--no-workdir", "--vm", vm, "--", "echo", "up")
    began = time.perf_counter()
    process = place.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.readline()
    seconds = time.perf_counter() - began
    words = process.communicate(timeout=DEADLINE_S)[1].decode()
    if said != b"up\n":
        raise RuntimeError(f"wnodes run, {kind}, start={start}: exit code {process.returncode}: {words.strip()[-500:]}")
    return seconds


def _floor(place: Ground, kind: str) -> dict[str, float]:
    """Medians of plain QEMU: ``restore`` (state loaded, running) and ``channel`` (woken, one command run)."""
    with _helper(place, kind, "floor", FLOORS) as runs:
        found = [json.loads(line) for line in runs]
    return {name: statistics.median(run[name] for run in found) for name in ("restore", "channel")}


def _crowd(place: Ground) -> Iterator[Figure]:
    """Clones of one template alive at once: seconds and private memory of each, from the first to the last."""
    with _helper(place, "minimal", "crowd", CROWD[-1]) as lines:
        found = [json.loads(line) for line in lines]
    curve = ", ".join(f"{n}: {found[n - 1]['seconds']:.3f} s, {found[n - 1]['private_mib']:.0f} MiB" for n in CROWD)
    share = statistics.median(run["private_mib"] for run in found) / CROWD_MIB
    yield Figure(
        f"clones of a {CROWD_MIB} MiB template alive at once", len(found), "", f"≥ {CROWD[-1]}",
        len(found) >= CROWD[-1],
        f"start and private memory of the Nth: {curve}; all answer at the end",
    )  # fmt: skip
    yield Figure(
        "private memory of an idle clone, of its guest's RAM", share, "", "≤ 0.10", share <= 0.10,
        f"median of {len(found)} (smaps_rollup, Private_*) after the last had started",
    )  # fmt: skip
    total = sum(run["seconds"] for run in found)
    yield Figure(
        "clones started one after the other", len(found) / total, "per s", "", None, f"{total:.1f} s for {len(found)}"
    )


@contextmanager
def _helper(place: Ground, kind: str, what: str, count: int) -> Iterator[Any]:
    """``warm_floor.py`` as the user: a line of JSON for each start."""
    argv = [
        sys.executable,
        "-P",
        FLOOR,
        what,
        place.folder / "templates",
        image(kind).digest,
        str(count),
        place.folder / "f",
    ]
    process = place.popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
        if process.returncode:
            raise RuntimeError(f"{what}: {err.decode()[-800:]}")
        yield out.decode().splitlines()
    finally:
        process.kill()


if __name__ == "__main__":
    print(json.dumps([figure.to_dict() for figure in measure()], indent=1, ensure_ascii=False))
