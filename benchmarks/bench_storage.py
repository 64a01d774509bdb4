"""Every way to a folder of the host, side by side in one guest: rates, CPU, and their ratios to virtiofs.

``benchmarks/run storage --update-docs`` writes table and plots into docs/. Ratios are medians of
rounds in which each way had its turn, so that a machine that others use hurts all alike.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import storage_attach
import storage_clients
import storage_guest
import storage_ways
from figure import Figure
from storage_plot import document

__all__ = ["document", "measure", "update_docs"]

ROUNDS, MIB, DIRECT_MIB = 3, 48, 192
FILES = (10_000, 200, 200)  # a round each
TREE = 2000
LOAD = Path(__file__).with_name("storage_load.py").read_text()
BASE, NATIVE, BARE = "virtiofs", "host's file system", "port alone, no files"
LARGE, DIRECT = ("write", "read"), ("direct write", "direct read")
SMALL = ("random read", "random write", "create", "stat", "walk", "unlink", "git status")
Results = dict[str, dict[str, list[float]]]
_last: tuple[Results, dict[str, str], dict[str, storage_clients.Curve]] = ({}, {}, {})


def measure() -> list[Figure]:
    """All ways in turn, then the goals as ratios; what a mount costs; many clients of one host."""
    global _last
    curves = storage_clients.curves()  # first: the ways have a network of their own
    results, missing, attach = run()
    _last = results, missing, curves
    absent = [Figure(way, None, "", note=why) for way, why in missing.items()]
    return [*_goals(results, missing), *absent, *attach, *storage_clients.figures(curves)]


def update_docs(folder: Path) -> None:
    """Write the table and the plots of the last measurement."""
    document(*_last, folder, ROUNDS)


def run() -> tuple[Results, dict[str, str], list[Figure]]:
    """(way -> what -> values, way -> why it could not be had, what mounts cost)."""
    results: Results = {}
    missing: dict[str, str] = {}
    with storage_guest.guest() as guest:
        _plant(guest.source / "tree")
        pids = _mounted(guest, missing)
        for number in range(ROUNDS):
            for way in (NATIVE, BARE, *pids):
                print(f"benchmarks: storage: round {number + 1}, {way}", file=sys.stderr, flush=True)
                for what, value in _one(guest, way, pids.get(way, []), number).items():
                    results.setdefault(way, {}).setdefault(what, []).append(value)
        attach = storage_attach.figures(guest)
    return results, missing, attach


def _plant(tree: Path) -> None:
    """A tree of files that git knows, older than its index, so that git need not look into them."""
    for number in range(TREE):
        path = tree / f"d{number // 50}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")
        os.utime(path, (1e9, 1e9))
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "tree"]):
        subprocess.run(["git", "-c", "gc.auto=0", "-C", tree, *words], check=True)


def _mounted(guest: Any, missing: dict[str, str]) -> dict[str, list[int]]:
    pids = {}
    for way, mount in storage_ways.WAYS.items():
        try:
            pids[way] = mount(guest, storage_ways.target_of(way))
        except (storage_guest.Unavailable, OSError) as error:
            missing[way] = " ".join(str(error).split())
    shared = next(way for way in pids if way not in storage_ways.OWN_DISK)
    for way in storage_ways.OWN_DISK:
        storage_guest.must(
            guest, ["cp", "-a", f"{storage_ways.target_of(shared)}/tree", storage_ways.target_of(way)], timeout_s=300
        )
    return pids


def _one(guest: Any, way: str, gateway: list[int], number: int) -> dict[str, float]:
    """One way's turn."""
    native = way == NATIVE
    call: Callable[..., str] = _here if native else lambda argv: storage_guest.must(guest, argv, timeout_s=600)
    name = f"{number}-{''.join(filter(str.isalnum, way))}"
    folder = str(guest.source) if native else "" if way == BARE else storage_ways.target_of(way)
    found: dict[str, float] = {}
    for what in _parts(way):
        before = storage_guest.cpu_seconds([guest.process.pid, *gateway])
        if way == BARE:
            said = storage_ways.bare_port(guest, what, MIB, call)
        else:
            files = TREE if what == "git" else FILES[number]
            mib = DIRECT_MIB if what == "direct" else MIB
            cold = "file" if native else "machine"
            said = call(["python3", "-I", "-c", LOAD, what, folder, name, cold, str(mib), str(files)])
        spent = storage_guest.cpu_seconds([guest.process.pid, *gateway]) - before
        found |= json.loads(said)
        if what in ("large", *LARGE):
            found["host"] = found.get("host", 0.0) + spent
    shutil.rmtree(guest.source / name, ignore_errors=True)
    return _for_each_gib(found, native)


def _parts(way: str) -> tuple[str, ...]:
    if way == BARE:
        return LARGE
    disks = ("direct",) if way in (NATIVE, *storage_ways.OWN_DISK) else ()
    return ("large", "small", *disks, "git")


def _for_each_gib(found: dict[str, float], native: bool) -> dict[str, float]:
    """CPU seconds of the large part as seconds for each GiB; on the host itself there is no guest."""
    gib, spent = MIB / 1024, found.pop("host")
    cpu = {f"{what} cpu": found.pop(f"{what} cpu") / gib for what in LARGE}
    if native:
        return {**found, "host CPU": statistics.mean(cpu.values())}
    return {**found, **cpu, "host CPU": spent / gib / 2}


def _here(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


def ratio(results: Results, way: str, what: str, base: str = BASE) -> float | None:
    """Median over the rounds of one way's rate by the base's, None if either is missing."""
    mine, other = results.get(way, {}).get(what), results.get(base, {}).get(what)
    if not mine or not other:
        return None
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def _goals(results: Results, missing: dict[str, str]) -> list[Figure]:
    load = f"{ROUNDS} rounds in turn, load {os.getloadavg()[0]:.1f}"
    goals = [
        ("virtiofs, clone", BASE, LARGE, 0.8),
        ("virtiofs, clone", BASE, SMALL, 0.5),
        ("sshfs, channel", BASE, LARGE, 0.8),
        ("NFS", BASE, LARGE, 0.8),
        ("sshfs, channel", BASE, ("create", "stat", "unlink", "git status"), 0.5),
        ("sshfs, channel", "sshfs, encrypted", (*LARGE, *SMALL), 1.0),
        ("scratch disk", NATIVE, (*DIRECT, *LARGE), 0.9),
        ("scratch disk", "overlay disk", (*LARGE, *DIRECT, "random write"), None),
        ("sshfs, channel", BARE, LARGE, None),
    ]
    figures = []
    for way, base, columns, want in goals:
        for what in columns:
            value = ratio(results, way, what, base)
            ok = None if value is None or want is None else value >= want
            why = missing.get(way) or missing.get(base) or load
            target = "" if want is None else f"≥ {want:g}"
            figures.append(Figure(f"{way} against {base}: {what}", value, "×", target, ok, why))
    return figures
