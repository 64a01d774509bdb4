"""What stays resident on the node for one VM job: wnodesd, keeper, launcher, QEMU beyond the guest's RAM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from figure import Figure
from ground import image, one_guest, slurm_site
from wnodes_slurm.testing import until

from wnodes_core import processes

LEASES = 20
TARGET_MIB = 60.0
JOB_MIB = 1200
# Touch most of the guest's memory, so that QEMU's own share is seen with a guest at work.
SCRIPT = "head -c 300M /dev/zero >/dev/shm/filled; touch ready; until [ -e go ]; do sleep 0.2; done\n"


def measure() -> list[Figure]:
    """Resident memory of each of our processes while one real VM job runs, and of wnodesd with many leases."""
    with one_guest(), slurm_site(image("minimal"), "m") as site:
        idle = _of(site.daemon.pid)
        job = site.submit(SCRIPT, "--cpus-per-task=2", f"--mem={JOB_MIB}")
        lease = site.wait_running(job)
        until(lambda: (site.work / "ready").exists(), "sign of life from the job", 60)
        launcher = _of(_pid_of(str(site.folder / "hooks" / "launch")))
        keeper, one = _of(lease["keeper_pid"]), _of(site.daemon.pid)
        vm_pid = _pid_of(f"guest=wnodes-{lease['id']},debug-threads=on")
        qemu, ram = _of(vm_pid), _guest_ram(vm_pid)
        (site.work / "go").touch()
        site.ended(job)
        site.assert_nothing_left()
        held, many = _many_leases(site)
    return [
        _figure("launcher", launcher, "in front of one batch script, under Slurm"),
        _figure("keeper", keeper, "libvirt's QEMU driver in it; one for each VM"),
        _figure("wnodesd, one lease", one, f"idle {idle[0]:.1f} MiB"),
        _figure(f"wnodesd, {held} leases", many, "prepared, their VMs not yet started"),
        Figure(
            "QEMU beyond the guest's RAM",
            qemu[0] - ram,
            "MiB",
            "",
            None,
            f"RSS {qemu[0]:.0f} MiB, of it guest RAM {ram:.0f} MiB; TCG's translation buffer, ≤ 128 MiB, is in it",
        ),
    ]


def _figure(name: str, found: tuple[float, float], note: str) -> Figure:
    rss, pss = found
    return Figure(f"resident, {name}", rss, "MiB", f"≤ {TARGET_MIB:g}", rss <= TARGET_MIB, f"PSS {pss:.1f} MiB; {note}")


def _of(pid: int) -> tuple[float, float]:
    """RSS and PSS in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = dict(re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE))
    return int(kib["Rss"]) / 1024, int(kib["Pss"]) / 1024


def _guest_ram(pid: int) -> float:
    """Resident MiB of QEMU's largest mapping, which is the guest's RAM."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    sizes = [int(word) for word in re.findall(r"^Size: +(\d+) kB", text, re.MULTILINE)]
    resident = [int(word) for word in re.findall(r"^Rss: +(\d+) kB", text, re.MULTILINE)]
    return max(zip(sizes, resident, strict=True))[1] / 1024


def _pid_of(word: str) -> int:
    """The newest process with this word in its argv."""
    return max((process.started, process.pid) for process in processes.table() if word in process.command)[1]


def _many_leases(site: Any) -> tuple[int, tuple[float, float]]:
    """wnodesd after many jobs were announced; its sweeper ends them, since Slurm knows none of them."""
    import pwd

    entry = pwd.getpwnam(site.user)
    common = {"lrms": "slurm", "node": "m0", "uid": entry.pw_uid, "gid": entry.pw_gid, "user": site.user}
    for number in range(LEASES):
        job = {**common, "job_id": str(90000 + number), "cpus": 1, "memory_mib": 800, "work_dir": str(site.work)}
        site.ask({"op": "prepare", "lrms": "slurm", "request": {"image": "debian12"}, "job": job})
    found = _of(site.daemon.pid)
    held = len(site.ask({"op": "leases"})["leases"])
    for number in range(LEASES):
        site.ask({"op": "finish", "lrms": "slurm", "job_id": str(90000 + number), "node": "m0"})
    return held, found


if __name__ == "__main__":
    print(json.dumps([figure.to_dict() for figure in measure()], indent=1, ensure_ascii=False))
