"""A whole site for tests: the simulator of LSF, wnodesd, our hooks installed as an admin would, an image.

But for LSF nothing is a fake. Folders lie in /var/tmp, which ordinary users can traverse.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wnodes_core import command, processes
from wnodes_core.agent import client
from wnodes_core.images.store import Store
from wnodes_core.model import Image, Process
from wnodes_core.plugins import Plugins
from wnodes_lsf import install
from wnodes_lsf.simulator import lab

USER = "wnodes-t1"
IMAGES = Path("/var/tmp/wnodes-test-images")  # kept between runs: it holds nothing but the built image
OVER = ("DONE", "EXIT")
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
  lsf:
    environment:
      PATH: {path}
      LSF_ENVDIR: {envdir}
{more}
"""


def make_user(name: str = USER) -> str:
    """An ordinary user for tests; made once, found again."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        command.run(["useradd", "--create-home", "--shell", "/bin/bash", name])
    return name


def until(ready: Callable[[], object], what: Callable[[], str] | str, timeout_s: float = 30.0) -> Any:
    """Wait until ``ready()`` is true and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := ready()):
        said = what if isinstance(what, str) else what()
        assert time.monotonic() < deadline, f"no {said} within {timeout_s:g} s"
        time.sleep(0.03)
    return value


def add_image(image: Image) -> None:
    """Enter the built image once as ``debian12``; at once if these very bytes are there."""
    store = Store(IMAGES, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    if any(entry.disk.digest == image.digest for entry in store.entries()):
        return
    boot = image.boot
    assert boot is not None
    store.add(image.path, "debian12", kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)


class Site:
    """``with Site(image) as site:`` - up in about two seconds, down without a trace.

    ``settings`` is further YAML for wnodes.yaml, ``build`` when it makes templates, ``more_queues`` further
    blocks of lsb.queues, ``queue`` lines that replace or join those of the VM queue; the rest goes to ``Lab``
    (``release="T"`` or ``"D"``, options of lsf.conf). Job ids are ``"101"``, or ``"101[2]"`` for an
    element of an array.
    """

    def __init__(
        self,
        image: Image | None,
        *,
        settings: str = "",
        build: str = "never",
        queue: Mapping[str, str] | None = None,
        more_queues: str = "",
        **options: Any,
    ) -> None:
        if image is not None:
            add_image(image)
        self.folder = Path(tempfile.mkdtemp(prefix="wnodes-lsf-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.user = make_user()
        self.work = self.folder / "work"  # the jobs' folder, the user's
        self.work.mkdir()
        shutil.chown(self.work, self.user, self.user)
        options = {"JOB_TERMINATE_INTERVAL": 4, "LSB_SIM_MINUTE": 1, "LSB_SIM_RUNLIMIT_GRACE": 4, **options}
        self.lab = lab.Lab(self.folder / "lsf", queues=lab.QUEUES + more_queues, **options)
        self.generic = options.get("release", "T") == "T"
        self.queue_lines = dict(queue or {})
        self.config = self.folder / "wnodes.yaml"
        where = {"path": f"{self.lab.bindir}:{command.PATH}", "envdir": self.lab.envdir}
        self.config.write_text(CONFIG.format(folder=self.folder, images=IMAGES, build=build, more=settings, **where))
        self.daemon = 0
        self.node = os.uname().nodename.split(".")[0]  # as leases of this site name it

    def __enter__(self) -> Site:
        try:
            self.lab.write()
            (self.folder / "run").mkdir()
            self.install()
            self.start_wnodesd()
            self.lab.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def install(self, **more: Any) -> None:
        """Connect wnodes to the cluster, as ``wnodes lsf install --apply`` does."""
        where = (self.lab.serverdir, self.lab.envdir / "lsb.queues", self.folder / "hooks", self.folder / "run")
        given = {"slots": False, "generic": self.generic, **more}
        for step in install.plan(install.Site(*where, sys.executable, **given)):
            step.apply()
        path = self.lab.envdir / "lsb.queues"
        text = path.read_text()
        for key, value in self.queue_lines.items():
            text = re.sub(rf"(?m)(QUEUE_NAME = vm\n(?:(?!End Queue).*\n)*?){key} = .*\n", r"\1", text)
            text = text.replace("QUEUE_NAME = vm\n", f"QUEUE_NAME = vm\n{key} = {value}\n")
        path.write_text(text)

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
        log = os.open(self.folder / "wnodesd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        argv = [sys.executable, "-I", "-m", "wnodes_core.agent.server", "--config", str(self.config)]
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in ((null, 0), (log, 1), (log, 2))]
        self.daemon = os.posix_spawn(argv[0], argv, dict(os.environ), file_actions=actions, setsid=True)
        os.close(log)
        os.close(null)
        until(self._answers, lambda: f"wnodesd; its log: {self.log()[-2000:]}", 30)

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
        if self.daemon:
            os.kill(self.daemon, number)
            os.waitpid(self.daemon, 0)
            self.daemon = 0

    def log(self) -> str:
        """What wnodesd wrote."""
        path = self.folder / "wnodesd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def lease(self, job: str) -> dict[str, Any]:
        """A job's lease, living or ended; {} if there is none."""
        key = job.replace("[", "_").rstrip("]")
        found = [e for e in self.ask({"op": "leases", "ended": True})["leases"] if e["job_id"] == key]
        return found[-1] if found else {}

    def wait_running(self, job: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """The job's lease once its guest runs."""
        what = f"running VM of job {job}"
        until(lambda: self.lease(job).get("keeper_state") == "running", lambda: f"{what}: {self.about(job)}", timeout_s)
        return self.lease(job)

    def about(self, job: str) -> str:
        """All that helps to see what went wrong."""
        logs = {name: self.lab.log(name)[-1500:] for name in ("sbatchd", "mbatchd")}
        return f"{self.show(job)} output {self.output(job)[-1500:]!r} wnodesd {self.log()[-3000:]} {logs}"

    # jobs

    def submit(self, script: str, *options: str, image: str = "debian12", **how: Any) -> str:
        """``bsub < script`` as the user, in the work folder; the job's id."""
        return self.bsub([*options], image=image, stdin=("#!/bin/bash\n" + script).encode(), **how)

    def bsub(self, argv: Sequence[str], *, image: str = "debian12", **how: Any) -> str:
        """``bsub`` with these words (options, a command); the job's id. Raises CommandError."""
        vm = ["-a", f"wnodes(image={image})"] if image else []
        done = self.run_as(["bsub", *vm, "-o", "out-%J-%I", *argv], **how)
        match = re.search(r"Job <(\d+)>", done.text)
        assert match, done
        return match[1]

    def run_as(self, argv: Sequence[str], *, timeout_s: float = 180, **how: Any) -> command.Result:
        """Run a command as the user in the work folder; ``environ`` is added to theirs. Raises CommandError."""
        return self.lab.run_as(self.user, list(argv), cwd=str(self.work), timeout_s=timeout_s, **how)

    def show(self, job: str) -> dict[str, str]:
        """The job as bjobs shows it: ``stat``, ``exit_code``, ``queue``, ``exec_host``, …"""
        fields = "jobid jobindex stat user queue exec_host job_name exit_code slots"
        records = json.loads(self.lab.run(["bjobs", "-u", "all", "-a", "-json", "-o", fields, job]).text)["RECORDS"]
        return {name.lower(): value for name, value in records[0].items()}

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, str]:
        """The job once it is over."""
        until(lambda: self.show(job)["stat"] in OVER, lambda: f"end of job {job}: {self.about(job)}", timeout_s)
        return self.show(job)

    def output(self, job: str) -> str:
        """What the job printed."""
        number, _, index = job.partition("[")
        path = self.work / f"out-{number}-{index.rstrip(']') or 0}"
        return path.read_text(errors="replace") if path.exists() else ""

    # what is left

    def ours(self) -> list[Process]:
        """Living processes that belong to leases of this site: they name its folder."""
        mark = str(self.folder / "state")
        return [p for p in processes.table() if any(mark in word for word in p.command) and p.pid != os.getpid()]

    def keepers(self) -> list[Process]:
        """The keepers of this site's leases."""
        pids = [e["keeper_pid"] for e in self.ask({"op": "leases"})["leases"] if e.get("keeper_pid")]
        return [p for p in map(processes.read, pids) if p]

    def assert_nothing_left(self, timeout_s: float = 20.0) -> None:
        """No lease, process, folder, marker or journal of any job remains."""
        until(lambda: not self._left(), lambda: f"clean node: {self._left()}", timeout_s)

    def _left(self) -> list[str]:
        left = [f"process {p.pid} {' '.join(p.command)[:80]}" for p in self.ours()]
        for folder in ("state/leases", "state/journal", "run/lsf"):
            path = self.folder / folder
            left += [str(each) for each in path.iterdir()] if path.exists() else []
        return left + [json.dumps(e)[:300] for e in self.ask({"op": "leases"})["leases"]]
