"""A whole site for tests: a real Slurm, wnodesd, our hooks installed, the small image in the store.

Nothing is a fake here. Folders lie in /var/tmp, which ordinary users can traverse.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wnodes_slurm import install
from wnodes_slurm.lab import Lab
from wnodes_slurm.testing import make_user, until

from wnodes_core import command, processes
from wnodes_core.agent import client
from wnodes_core.images.store import Store
from wnodes_core.model import Image
from wnodes_core.plugins import Plugins

IMAGES = Path("/var/tmp/wnodes-test-images")  # kept between runs: it holds nothing but the built image
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
CONFIG = """\
state_dir: {folder}/state
run_dir: {folder}/run
accel: tcg
images:
  folder: {images}
warm:
  build: {build}
daemon:
  sweep_interval_s: 2
  log_level: debug
lrms:
  slurm:
    environment:
      SLURM_CONF: {conf}
{more}
"""


def add_image(image: Image) -> None:
    """Enter the built image once; at once if these very bytes are there."""
    store = Store(IMAGES, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    if any(entry.disk.digest == image.digest for entry in store.entries()):
        return
    boot = image.boot
    assert boot is not None
    store.add(image.path, "debian12", kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)


class Site:
    """``with Site(image, prefix="a") as site:`` - up in about two seconds, down without a trace.

    ``settings`` is further YAML for wnodes.yaml, ``build`` when it makes templates; everything else goes to ``Lab``.
    """

    def __init__(self, image: Image, prefix: str, *, settings: str = "", build: str = "never", **lab: Any) -> None:
        add_image(image)
        self.folder = Path(tempfile.mkdtemp(prefix="wnodes-site-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.user = make_user()
        self.work = self.folder / "work"  # the jobs' folder, the user's
        self.work.mkdir()
        shutil.chown(self.work, self.user, self.user)
        lab = {"kill_wait_s": 5, "memory_mib": 6000, "mem_per_cpu_mib": 800, **lab}
        self.lab = Lab(self.folder / "lab", prefix=prefix, **lab)
        self.config = self.folder / "wnodes.yaml"
        facts = {"folder": self.folder, "images": IMAGES, "conf": self.lab.conf}
        self.config.write_text(CONFIG.format(**facts, build=build, more=settings))
        self.daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Site:
        try:
            self.lab.write()
            (self.folder / "run").mkdir()
            where = install.Site(self.lab.conf, self.folder / "hooks", self.folder / "run", sys.executable)
            install.build(where)
            for step in install.plan(where):
                step.apply()
            self.start_wnodesd()
            self.lab.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.down()
        self.stop_wnodesd()
        for process in self.ours():
            processes.kill(process)
        if os.environ.get("WNODES_TEST_KEEP") != "1":
            shutil.rmtree(self.folder, ignore_errors=True)

    # wnodesd

    def start_wnodesd(self) -> None:
        """Start the daemon and wait until it answers."""
        log = open(self.folder / "wnodesd.log", "ab")  # noqa: SIM115 - the child's
        argv = [sys.executable, "-I", "-m", "wnodes_core.agent.server", "--config", str(self.config)]
        self.daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        log.close()
        until(self._answers, f"wnodesd; its log: {self.log()[-2000:]}", 30)

    def _answers(self) -> bool:
        try:
            return bool(self.ask({"op": "status"})["ok"])
        except Exception:  # noqa: BLE001 - not yet
            return False

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question to wnodesd, as root."""
        return client.call(question, path=f"{self.folder}/run/wnodesd.sock", timeout_s=30)

    def stop_wnodesd(self, number: int = signal.SIGTERM) -> None:
        """End the daemon; its leases go on."""
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.daemon.wait(20)
            self.daemon = None

    def log(self) -> str:
        """What wnodesd wrote."""
        path = self.folder / "wnodesd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def lease(self, job: str) -> dict[str, Any]:
        """A job's lease, living or ended; {} if there is none."""
        found = [e for e in self.ask({"op": "leases", "ended": True})["leases"] if e["job_id"] == job]
        return found[-1] if found else {}

    def wait_running(self, job: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """The job's lease once its guest runs."""
        until(
            lambda: self.lease(job).get("keeper_state") == "running",
            f"running VM of job {job}: {self.log()[-1500:]}",
            timeout_s,
        )
        return self.lease(job)

    # jobs

    def submit(self, script: str, *options: str, image: str = "debian12") -> str:
        """Submit a batch script as the user, in the work folder; the job's id."""
        path = self.work / f"job{time.monotonic_ns()}.sh"
        path.write_text("#!/bin/bash\n" + script)
        path.chmod(0o755)
        vm = [f"--vm-image={image}"] if image else []
        argv = ["sbatch", "--parsable", "--output=out-%A-%a", *vm, *options, str(path)]
        return self.run_as(argv).text.strip()

    def run_as(self, argv: list[str], *, check: bool = True, timeout_s: float = 180) -> command.Result:
        """Run a command as the user in the work folder. Raises CommandError."""
        return self.lab.run_as(self.user, argv, cwd=str(self.work), check=check, timeout_s=timeout_s)

    def show(self, job: str) -> dict[str, str]:
        """One-word fields of ``scontrol show job``."""
        text = self.lab.run(["scontrol", "-o", "show", "job", job])
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def show_text(self, job: str) -> str:
        """All of ``scontrol show job``."""
        return self.lab.run(["scontrol", "-o", "show", "job", job])

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, str]:
        """The fields of a job once it is over on every node."""
        until(lambda: self.show(job)["JobState"] in OVER, f"end of job {job}: {self.show(job)}", timeout_s)
        until(
            lambda: job not in self.lab.run(["squeue", "-h", "-o", "%A"]).split(),
            f"end of job {job} in squeue",
            timeout_s,
        )
        return self.show(job)

    def output(self, job: str, task: str = "4294967294") -> str:
        """What the batch script printed."""
        path = self.work / f"out-{job}-{task}"
        return path.read_text(errors="replace") if path.exists() else ""

    def nodes(self) -> set[str]:
        """The states the nodes are in."""
        return set(self.lab.run(["sinfo", "-h", "-N", "-o", "%T"]).split())

    # what is left

    def ours(self) -> list[processes.Process]:
        """Living processes that belong to leases of this site: they name its folder."""
        mark = str(self.folder / "state")
        return [p for p in processes.table() if any(mark in word for word in p.command) and p.pid != os.getpid()]

    def keepers(self) -> list[processes.Process]:
        """The keepers of this site's leases."""
        pids = [e["keeper_pid"] for e in self.ask({"op": "leases"})["leases"] if e.get("keeper_pid")]
        return [p for p in map(processes.read, pids) if p]

    def assert_nothing_left(self, timeout_s: float = 20.0) -> None:
        """No lease, process, folder, marker or journal of any job remains; the nodes are not drained."""
        until(lambda: not self._left(), f"clean node: {self._left()}", timeout_s)
        assert not {state for state in self.nodes() if "drain" in state or "down" in state}, self.nodes()

    def _left(self) -> list[str]:
        left = [f"process {p.pid} {' '.join(p.command)[:80]}" for p in self.ours()]
        for folder in ("state/leases", "state/journal", "run/slurm"):
            path = self.folder / folder
            left += [str(each) for each in path.iterdir()] if path.exists() else []
        return left + [json.dumps(e)[:300] for e in self.ask({"op": "leases"})["leases"]]


def wait_for(ready: Callable[[], object], what: str, timeout_s: float = 30.0) -> object:
    """``until`` by another name, for tests that import only this file."""
    return until(ready, what, timeout_s)
