"""``wnodes run``: no batch system at all; what a user would type in a shell."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from lrms import Ask, End, Lrms
from slurm_site import IMAGES, add_image
from wnodes_slurm.testing import make_user

from wnodes_core import processes
from wnodes_core.model import Image

WNODES = Path(sys.executable).parent / "wnodes"
CONFIG = "accel: tcg\nimages:\n  folder: {images}\n"


class Local(Lrms):
    """A job is a process of ``wnodes run``."""

    name, title = "local", "`wnodes run`"
    cannot = {
        "cancel queued": "there is no queue",
        "array": "there are no arrays",
        "requeue": "there is no queue",
    }

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.user = pwd.getpwnam(make_user())
        self.folder = Path(tempfile.mkdtemp(prefix="wnodes-loc-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self._room = threading.Semaphore(self.at_once)
        self._jobs: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: set[str] = set()
        self._leases: dict[str, dict[str, Any]] = {}

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def __enter__(self) -> Local:
        add_image(self.image)
        self.work.mkdir()
        shutil.chown(self.work, self.user.pw_uid, self.user.pw_gid)
        (self.folder / "wnodes.yaml").write_text(CONFIG.format(images=IMAGES))
        return self

    def __exit__(self, *error: object) -> None:
        for job in self._jobs.values():
            job.kill()
            job.wait()
        shutil.rmtree(self.folder)

    def submit(self, ask: Ask) -> str:
        self._room.acquire()
        script = self.work / f"{ask.key}.sh"
        script.write_text("#!/bin/bash\n" + ask.text(self.work))
        script.chmod(0o755)
        limit = ["timeout", str(ask.time_s)] if ask.time_s else []
        memory = ["--memory", f"{ask.memory_mib}M"] if ask.memory_mib else ["--memory", "512M"]
        argv = [*limit, str(WNODES), "run", "-q", "--image", ask.image, "--start", "cold", *memory, "--", str(script)]
        environ = {"HOME": self.user.pw_dir, "PATH": "/usr/bin:/bin", "WNODES_CONFIG": f"{self.folder}/wnodes.yaml"}
        groups = os.getgrouplist(self.user.pw_name, self.user.pw_gid)
        with (
            open(ask.stdin or os.devnull, "rb") as stdin,
            open(self.folder / f"{ask.key}.out", "wb") as out,
            open(self.folder / f"{ask.key}.err", "wb") as err,
        ):
            self._jobs[ask.key] = subprocess.Popen(
                argv, stdin=stdin, stdout=out, stderr=err, cwd=self.work, env=environ, start_new_session=True,
                user=self.user.pw_uid, group=self.user.pw_gid, extra_groups=groups, umask=0o022,
            )  # fmt: skip
        return ask.key

    def cancel(self, job: str) -> None:
        self.signal(job, "TERM")

    def signal(self, job: str, name: str) -> None:
        if self._jobs[job].poll() is None:
            self._jobs[job].send_signal(getattr(signal, f"SIG{name}"))

    def abandon(self, job: str) -> None:
        self._jobs[job].kill()
        self.end(job)

    def end(self, job: str) -> End:
        code = self._jobs[job].wait(400)
        if job not in self._ended:
            self._ended.add(job)
            self._room.release()
        return End(f"exit {code}" if code >= 0 else f"signal {-code}", code if code >= 0 else None, -code if code < 0 else None)

    def output(self, job: str) -> bytes:
        return (self.folder / f"{job}.out").read_bytes()

    def said(self, job: str) -> str:
        return (self.folder / f"{job}.err").read_text(errors="replace")

    def lease(self, job: str) -> dict[str, Any]:
        """The keeper is a child of the launcher, and its folder bears the lease's name."""
        mine = {self._jobs[job].pid}
        everybody = list(processes.table())
        mine |= {p.pid for p in everybody if p.parent in mine}  # behind timeout(1)
        for process in everybody:
            if process.parent in mine and "wnodes_core.keeper" in process.command:
                folder = Path(os.readlink(f"/proc/{process.pid}/cwd"))
                state = self._state(folder)
                self._leases[job] = {"id": folder.name, "keeper_pid": process.pid, "keeper_state": state}
        return self._leases.get(job, {})

    @staticmethod
    def _state(folder: Path) -> str:
        try:
            return "running" if '"state": "running"' in (folder / "lease.json").read_text() else "starting"
        except OSError:
            return "starting"

    def queued(self, job: str) -> bool:
        return False

    def left(self) -> list[str]:
        names = [lease["id"] for lease in self._leases.values()]
        left = [" ".join(p.command)[:100] for p in processes.table() if any(name in "".join(p.command) for name in names)]
        return left + [str(p) for name in names if (p := Path(f"/var/tmp/wnodes-{self.user.pw_uid}/{name}")).exists()]



