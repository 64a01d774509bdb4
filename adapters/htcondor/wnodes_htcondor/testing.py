"""A whole site for tests: a real HTCondor, wnodesd, our hooks installed, an image in the store.

Nothing is a fake here. Folders lie in /var/tmp, which ordinary users can traverse. The words are
those of the Slurm site's: ``submit``, ``ended``, ``output``, ``wait_running``, ``assert_nothing_left``.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wnodes_core import command, processes, tools
from wnodes_core.agent import client
from wnodes_core.api import Process
from wnodes_core.images.store import Store
from wnodes_core.model import Image
from wnodes_core.plugins import Plugins
from wnodes_htcondor import install
from wnodes_htcondor.lab import Lab

USER = "wnodes-t1"
IMAGES = Path("/var/tmp/wnodes-test-images")  # kept between runs: it holds nothing but the built image
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
  htcondor:
    environment:
      CONDOR_CONFIG: {conf}
      PATH: {path}
{more}
"""
SUBMIT = """\
executable = {script}
output = out-$(ClusterId)-$(ProcId)
error = err-$(ClusterId)-$(ProcId)
log = log-$(ClusterId)
should_transfer_files = YES
request_cpus = 1
request_memory = 800
request_disk = 10MB
{more}
queue {count}
"""
# JobStatus, from the HTCondor manual's appendix "Job ClassAd Attributes"
STATES = {1: "IDLE", 2: "RUNNING", 3: "REMOVED", 4: "COMPLETED", 5: "HELD", 6: "TRANSFERRING_OUTPUT", 7: "SUSPENDED"}


def make_user(name: str = USER) -> str:
    """An ordinary user for tests; made once, found again."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        command.run(["useradd", "--create-home", "--shell", "/bin/bash", name])
    return name


def until(ready: Callable[[], object], what: str, timeout_s: float = 30.0) -> object:
    """Wait until ``ready()`` is true and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (value := ready()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.05)
    return value


def add_image(image: Image, name: str = "debian12") -> None:
    """Enter the built image once; at once if these very bytes are there under that name."""
    store = Store(IMAGES, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    if any(entry.disk.digest == image.digest and entry.name == name for entry in store.entries()):
        return
    boot = image.boot
    assert boot is not None
    store.add(image.path, name, kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)


class Site:
    """``with Site(image) as site:`` - up in a few seconds, down without a trace.

    ``release`` is HTCondor's (``23``, ``25``), ``settings`` further YAML for wnodes.yaml, ``build``
    when templates are made, ``condor`` further lines of HTCondor's configuration, read before ours;
    everything else goes to ``Lab``.
    """

    def __init__(
        self,
        image: Image,
        *,
        settings: str = "",
        build: str = "never",
        condor: str = "",
        release: str = "23",
        **lab: Any,
    ) -> None:
        add_image(image)
        self.folder = Path(tempfile.mkdtemp(prefix="wnodes-htc-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.user = make_user()
        self.work = self.folder / "work"  # where the user submits from
        self.work.mkdir()
        shutil.chown(self.work, self.user, self.user)
        self.lab = Lab(self.folder / "lab", release=release, **lab)
        self.condor = condor
        self.config = self.folder / "wnodes.yaml"
        facts = {"folder": self.folder, "images": IMAGES, "conf": self.lab.conf, "path": self.lab.environ["PATH"]}
        self.config.write_text(CONFIG.format(**facts, build=build, more=settings))
        self.daemon: Any = None

    def __enter__(self) -> Site:
        try:
            self.lab.write()
            (self.folder / "run").mkdir()
            (self.lab.config_d / "50-site.conf").write_text(self.condor)
            for step in install.plan(self.site()):
                step.apply()
            self.start_wnodesd()
            self.lab.start()
            until(lambda: "true" in self.slots("HasWnodes"), f"HasWnodes; {self.lab.log('StartLog')}", 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def site(self) -> install.Site:
        """What ``wnodes htcondor install`` would work on."""
        config, version = install.ask(self.lab.environ)
        where = {"prefix": self.folder / "hooks", "run_dir": self.folder / "run", "python": sys.executable}
        return install.Site(config, version, period_s=2, vms=self.lab.cpus, **where)  # type: ignore[arg-type]

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
        argv = [sys.executable, "-I", "-m", "wnodes_core.agent.server", "--config", str(self.config)]
        with open(self.folder / "wnodesd.log", "ab") as log:
            self.daemon = tools.spawn(argv, stdout=log.fileno(), stderr=log.fileno())
        until(self._answers, f"wnodesd; its log: {self.log()[-2000:]}", 30)

    def _answers(self) -> bool:
        try:
            return bool(self.ask({"op": "status"})["accel"])
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
        return self._text(self.folder / "wnodesd.log")

    def lease(self, job: str) -> dict[str, Any]:
        """A job's newest lease, living or ended; {} if there is none. A cluster's id means its first job."""
        wanted = job if "." in job else f"{job}.0"
        found = [e for e in self.ask({"op": "leases", "ended": True})["leases"] if e["job_id"] == wanted]
        return found[-1] if found else {}

    def wait_running(self, job: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """The job's lease once its guest runs."""
        what = f"running VM of job {job}: {self._story(job)}"
        until(lambda: self.lease(job).get("keeper_state") == "running", what, timeout_s)
        return self.lease(job)

    # jobs

    def submit(
        self, script: str, *lines: str, image: str = "debian12", count: int = 1, shebang: str = "#!/bin/bash"
    ) -> str:
        """Submit a script as the user, in the work folder; ``lines`` go into the submit file. The cluster's id."""
        name = f"job{time.monotonic_ns()}"
        path = self.work / f"{name}.sh"
        path.write_text(f"{shebang}\n{script}")
        path.chmod(0o755)
        vm = [f"vm_image = {image}"] if image else []
        text = SUBMIT.format(script=path, more="\n".join([*vm, *lines]), count=count)
        (self.work / f"{name}.sub").write_text(text)
        return self.run_as(["condor_submit", "-terse", f"{name}.sub"]).text.split(".")[0].strip()

    def run_as(self, argv: list[str], *, check: bool = True, timeout_s: float = 180) -> command.Result:
        """Run a command as the user in the work folder. Raises CommandError."""
        return self.lab.run_as(self.user, argv, cwd=str(self.work), check=check, timeout_s=timeout_s)

    def show(self, job: str) -> dict[str, Any]:
        """The job's ad, from the queue or from history; {} if neither knows it."""
        words = [job if "." in job else f"{job}.0", "-json"]
        for argv in (["condor_q", "-all", *words], ["condor_history", *words]):
            text = self.lab.run(argv, check=False)
            if text.strip().startswith("["):
                found = json.loads(text)
                if found:
                    return dict(found[0])
        return {}

    def state(self, job: str) -> str:
        """One of ``STATES``' words, or ''."""
        return STATES.get(self.show(job).get("JobStatus", 0), "")

    def until_state(self, job: str, *states: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job's ad once it is in one of these states."""
        until(lambda: self.state(job) in states, f"{'/'.join(states)} of job {job}: {self._story(job)}", timeout_s)
        return self.show(job)

    def _story(self, job: str) -> str:
        fields = self.show(job)
        kept = {name: fields.get(name) for name in ("JobStatus", "HoldReason", "NumShadowStarts", "VacateReason")}
        return f"{kept} {self.log()[-1500:]}"

    def ended(self, job: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job's ad once it is over: completed, removed or held."""
        return self.until_state(job, "COMPLETED", "REMOVED", "HELD", timeout_s=timeout_s)

    def output(self, job: str, proc: int = 0) -> str:
        """What the job printed on stdout."""
        return self._text(self.work / f"out-{job}-{proc}")

    def errors(self, job: str, proc: int = 0) -> str:
        """What the job, and we, printed on stderr."""
        return self._text(self.work / f"err-{job}-{proc}")

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text(errors="replace") if path.exists() else ""

    def exit_code(self, job: str) -> int:
        """The job's exit code; minus the signal that ended it."""
        fields: Mapping[str, Any] = self.show(job)
        return -int(fields["ExitSignal"]) if fields.get("ExitBySignal") else int(fields["ExitCode"])

    def hold_reason(self, job: str) -> str:
        """Why the job is held, or ''."""
        return str(self.show(job).get("HoldReason", ""))

    def slots(self, attribute: str) -> set[str]:
        """The values that the slots of the machine show of an attribute."""
        return set(self.lab.run(["condor_status", "-af", attribute], check=False).split())

    def remove_all(self) -> None:
        """Remove every job and wait until the queue is empty: for a test that follows one that failed."""
        self.lab.run(["condor_rm", "-all"], check=False)
        left = ["condor_q", "-all", "-af", "ClusterId"]
        until(lambda: not self.lab.run(left, check=False).strip(), "empty queue", 60)

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
        """No lease, process, folder, marker, journal or sandbox of any job remains."""
        until(lambda: not self._left(), f"clean node: {self._left()} {self.log()[-1500:]}", timeout_s)

    def _left(self) -> list[str]:
        left = [f"process {p.pid} {' '.join(p.command)[:80]}" for p in self.ours()]
        for folder in ("state/leases", "state/journal", "run/htcondor", "lab/execute"):
            path = self.folder / folder
            left += [str(each) for each in path.iterdir()] if path.exists() else []
        return left + [json.dumps(e)[:300] for e in self.ask({"op": "leases"})["leases"]]
