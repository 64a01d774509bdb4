"""Cold start through us beside plain libvirt and a ping of QEMU's guest agent, same domain."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from figure import Figure, median_ratio
from ground import CPUS, MEMORY_MIB, Ground, ground, image, one_guest

from wnodes_core import processes
from wnodes_core.backends.libvirt import domain
from wnodes_core.images import disks
from wnodes_core.model import Disk, Job
from wnodes_core.plan import Plan, User

PAIRS = 3
SMALL_RUNS = 3
PAIRS_BUDGET_S = 130.0  # a third pair only where the first two were quick
DEADLINE_S = 180.0
PING = """qemu-agent-command {} '{{"execute":"guest-ping"}}' --timeout 2"""
STEP = re.compile(r"^(\S.*?) +-?[\d.]+ +([\d.]+)  \|", re.MULTILINE)


def measure() -> list[Figure]:
    """The ordinary cloud image against bare libvirt, then our own small image."""
    with one_guest(), ground("minimal", "cloud") as place:
        _learn(place)
        ours, bare, traces = _pairs(place)
        runs = [_ours(place, image("minimal").name) for _ in range(SMALL_RUNS)]
    small, trace = sorted(runs, key=lambda run: run[0]["answer"])[SMALL_RUNS // 2]
    ratio = median_ratio([each["answer"] for each in ours], bare)
    quick = small["answer"] / statistics.median(bare)
    seconds = statistics.median(each["answer"] for each in ours)
    first = statistics.median(each["first"] for each in ours)
    note = (
        f"{seconds:.2f} s against {statistics.median(bare):.2f} s for `virsh create` + `guest-ping`, "
        f"same domain, cloud image, {len(bare)} pairs A B B A; phases of our last: {traces[-1]}; "
        f"the command's first byte after {first:.2f} s; limit: that guest's own boot"
    )
    small_note = (
        f"{small['answer']:.2f} s, median of {SMALL_RUNS}, against the same bare starts of the cloud image; "
        f"phases: {trace}; the command's first byte after {small['first']:.2f} s"
    )
    return [
        Figure("cold start, LAUNCH → guest answers, against bare libvirt", ratio, "×", "≤ 1.05", ratio <= 1.05, note),
        Figure("cold start of our small image, against the bare cloud image", quick, "×", "", None, small_note),
    ]


def _learn(place: Ground) -> None:
    """Have libvirt learn QEMU's capabilities once for both sides: ours remembers them, bare keeps them in its root."""
    words = [place.folder / "bare", domain.emulator("x86_64"), "x86_64", "/var/lib/wnodes"]
    argv = [sys.executable, "-P", "-m", "wnodes_core.backends.libvirt.embed", *words]
    process = place.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if process.wait(120):
        raise RuntimeError(f"libvirt does not learn QEMU's capabilities: exit code {process.returncode}")


def _pairs(place: Ground) -> tuple[list[dict[str, float]], list[float], list[str]]:
    """A B B A …, so that neither side always finds what the other has just warmed."""
    ours, bare, traces = [], [], []
    began = time.monotonic()
    for number in range(PAIRS):
        if number == PAIRS - 1 and time.monotonic() - began > PAIRS_BUDGET_S:
            break
        for side in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
            if side == "bare":
                bare.append(_bare(place, number))
                continue
            found, trace = _ours(place, image("cloud").name)
            ours.append(found)
            traces.append(trace)
    return ours, bare, traces


def _ours(place: Ground, name: str) -> tuple[dict[str, float], str]:
    """``wnodes run`` of one command: seconds until the agent answered and until its first byte; the phases."""
    options = ["-q", "--image", name, "--cpus", str(CPUS), "--memory", f"{MEMORY_MIB}M", "--no-workdir", "--trace"]
    began = time.perf_counter()
    argv = place.argv("run", *options, "--", "echo", "up")
    process = place.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.readline()
    first = time.perf_counter() - began
    words = process.communicate(timeout=DEADLINE_S)[1].decode()
    if said != b"up\n":
        raise RuntimeError(f"wnodes run of {name}: exit code {process.returncode}: {words.strip()[-500:]}")
    steps = {step: float(seconds) for step, seconds in STEP.findall(words)}
    # "boot" ends with the agent's hello; what comes after it is ours to set the guest up and run the command.
    after = sum(steps[step] for step in ("agent", "mount", "first instruction"))
    return {"answer": first - after, "first": first}, ", ".join(f"{step} {steps[step]:.2f}" for step in steps)


def _bare(place: Ground, number: int) -> float:
    """Seconds of plain libvirt from ``create`` to the guest agent's answer."""
    folder = place.folder / f"b{number}"
    folder.mkdir()
    os.chown(folder, place.user.pw_uid, place.user.pw_gid)
    name, xml = _same_domain(place, folder)
    with _virsh(place, place.folder / "bare") as virsh:
        try:
            began = time.perf_counter()
            said = virsh.ask(f"create {xml}")
            if "created" not in said:
                raise RuntimeError(f"virsh create: {said.strip()}")
            while '"return"' not in (said := virsh.ask(PING.format(name))):
                if time.perf_counter() - began > DEADLINE_S:
                    raise RuntimeError(f"no answer from the guest agent in {DEADLINE_S:g} s: {said.strip()}")
                time.sleep(0.05)
            return time.perf_counter() - began
        finally:
            _end(name)


def _same_domain(place: Ground, folder: Path) -> tuple[str, Path]:
    """The name and XML file of the domain that our own plan of this image gives, on an overlay made beforehand."""
    entry = place.user
    job = Job("local", "b", "n0", entry.pw_uid, entry.pw_gid, entry.pw_name)
    user = User.of(entry.pw_uid, entry.pw_gid)
    plan = Plan(f"local-{folder.name}", str(folder), job, image("cloud"), user, "tcg", CPUS, MEMORY_MIB, (), DEADLINE_S)
    disk: Disk = plan.overlay
    disks.wnodes_disk_create(disk)
    os.chown(disk.path, entry.pw_uid, entry.pw_gid)
    vm = plan.vm(sorted(os.sched_getaffinity(0)))
    xml = folder / "domain.xml"
    xml.write_text(domain.build(vm).xml())
    return vm.name, xml


class _Virsh:
    """One virsh that is asked again and again: each embedded driver lives in one process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def ask(self, line: str) -> str:
        """What virsh says to one command."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{line}\necho end-of-answer\n".encode())
        self.process.stdin.flush()
        said = b""
        while b"\nend-of-answer" not in said.replace(b"virsh # ", b""):
            byte = os.read(self.process.stdout.fileno(), 65536)
            if not byte:
                raise RuntimeError(f"virsh ended: {said.decode(errors='replace').strip()}")
            said += byte
        return said.decode(errors="replace")


@contextmanager
def _virsh(place: Ground, root: Path) -> Iterator[_Virsh]:
    argv = ["stdbuf", "-o0", "virsh", "-c", f"qemu:///embed?root={root}"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    virsh = _Virsh(place.popen(argv, **pipes))
    virsh.ask("version")  # connected, the driver is up
    try:
        yield virsh
    finally:
        virsh.process.kill()
        virsh.process.communicate()


def _end(name: str) -> None:
    for process in processes.table():
        if f"guest={name}," in " ".join(process.command):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    print(json.dumps([figure.to_dict() for figure in measure()], indent=1, ensure_ascii=False))
