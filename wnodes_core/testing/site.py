"""What a whole site for tests has under every LRMS: a folder, a user, wnodesd, an image, and nothing left afterwards.

An adapter's own site adds its LRMS, the hooks installed as an admin would, and the words of its jobs. Nothing here
is a fake. Folders lie in /var/tmp, which ordinary users can traverse.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from wnodes_core import command, processes, settings
from wnodes_core.agent import client
from wnodes_core.images.layers import node_store
from wnodes_core.images.store import Store
from wnodes_core.model import Image, ImageRef, Process
from wnodes_core.plugins import Plugins
from wnodes_core.templates.choose import Chooser, Size

USER = "wnodes-t1"
IMAGES = Path("/var/tmp/wnodes-test-images")  # kept between runs: it holds nothing but the built image
SHARED = "shared"  # a site's ``build``: its VMs are clones of a template that all such sites have in common
_TEMPLATES = Path("/var/tmp/wnodes-test-templates")  # kept between runs, too
_BASE_MIB = 256  # no test's guest is smaller
_POLL_S = 0.03
_CONFIG = """\
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
  {lrms}:
    environment:
{environment}
{more}
"""


def make_user(name: str = USER) -> str:
    """An ordinary user for tests; made once, found again."""
    with _alone():
        try:
            pwd.getpwnam(name)
        except KeyError:
            command.run(["useradd", "--create-home", "--shell", "/bin/bash", name])
    return name


@contextmanager
def _alone() -> Iterator[None]:
    """One at a time, among the workers of a test run too."""
    with open(Path(tempfile.gettempdir()) / "wnodes-test-site.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def until(ready: Callable[[], object], what: Callable[[], str] | str, timeout_s: float = 30.0) -> Any:
    """Wait until ``ready()`` is true and return what it gave; ``what`` is asked for words only when it fails.

    Raises AssertionError.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := ready()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what if isinstance(what, str) else what()} within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return value


def add_image(image: Image, name: str = "debian12") -> None:
    """Enter the built image once; at once if these very bytes are there under that name."""
    boot = image.boot
    assert boot is not None
    with _alone():
        store = Store(IMAGES, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
        if not any(entry.disk.digest == image.digest and entry.name == name for entry in store.entries()):
            store.add(image.path, name, kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)


def add_template(config: Path, name: str = "debian12") -> None:
    """Have the template of an image built, for VMs of one CPU, as a site's settings want it; at once if it is there.

    Raises WnodesError.
    """
    from wnodes_core.agent.parts import BACKENDS

    site = settings.load(config, trusted=True)
    chooser = Chooser(site, Plugins(builtins=BACKENDS, scan=False).hook)
    store = node_store(site)
    image = store.image(store.resolve(ImageRef.parse(name)))
    assert image is not None
    chooser.builder("tcg").build(chooser.wanted(image, "tcg", Size(1, _BASE_MIB, 0))[0])


class Site:
    """A site whose LRMS a subclass brings: ``with TheirSite(image) as site:``.

    A subclass gives ``lrms`` and implements ``raise_lrms``, ``end_lrms`` and ``lease_job``.
    """

    lrms = ""

    def __init__(self, image: Image | None) -> None:
        if image is not None:
            add_image(image)
        self.folder = Path(tempfile.mkdtemp(prefix=f"wnodes-{self.lrms}-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.user = make_user()
        self.work = self.folder / "work"  # the jobs' folder, the user's
        self.work.mkdir()
        shutil.chown(self.work, self.user, self.user)
        self.config = self.folder / "wnodes.yaml"
        self.daemon: Any = None  # Popen
        self._clones = False

    def configure(self, *, settings: str, build: str, **environment: object) -> None:
        """Write wnodes.yaml; ``settings`` is further YAML, ``build`` says when it makes templates (or ``SHARED``)."""
        self._clones = build == SHARED
        if self._clones:
            build = f"never\n  folder: {_TEMPLATES}\n  base_memory_mib: {_BASE_MIB}"
        lines = "\n".join(f"      {name}: {value}" for name, value in environment.items())
        facts = {"folder": self.folder, "images": IMAGES, "lrms": self.lrms, "build": build}
        self.config.write_text(_CONFIG.format(**facts, environment=lines, more=settings))

    # what a subclass brings

    def raise_lrms(self) -> None:
        """Configure the LRMS, install our hooks as an admin would, call ``start_wnodesd``, start the LRMS."""
        raise NotImplementedError

    def end_lrms(self) -> None:
        """Stop the LRMS, wherever its start got to."""
        raise NotImplementedError

    def lease_job(self, job: str) -> str:
        """A job's id as its lease has it."""
        return job

    def __enter__(self) -> Self:
        try:
            (self.folder / "run").mkdir()
            if self._clones:
                add_template(self.config)
            self.raise_lrms()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end_lrms()
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
            environ = dict(os.environ)
            self.daemon = command.spawn(argv, stdout=log.fileno(), stderr=log.fileno(), environ=environ)
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
        if self.daemon is not None:
            self.daemon.send_signal(number)
            self.daemon.wait(20)
            self.daemon = None

    def log(self) -> str:
        """What wnodesd wrote."""
        return text_of(self.folder / "wnodesd.log")

    def lease(self, job: str) -> dict[str, Any]:
        """A job's newest lease, living or ended; {} if there is none."""
        wanted = self.lease_job(job)
        found = [e for e in self.ask({"op": "leases", "ended": True})["leases"] if e["job_id"] == wanted]
        return found[-1] if found else {}

    def wait_running(self, job: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """The job's lease once its guest runs."""
        what = f"running VM of job {job}"
        until(lambda: self.lease(job).get("keeper_state") == "running", lambda: f"{what}: {self.about(job)}", timeout_s)
        return self.lease(job)

    def about(self, job: str) -> str:
        """All that helps to see what went wrong with a job."""
        return self.log()[-3000:]

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
        until(lambda: not self.left(), lambda: f"clean node: {self.left()} {self.log()[-1500:]}", timeout_s)

    def left(self) -> list[str]:
        """What jobs have left on the node, in words."""
        left = [f"process {p.pid} {' '.join(p.command)[:80]}" for p in self.ours()]
        for folder in ("state/leases", "state/journal", f"run/{self.lrms}"):
            path = self.folder / folder
            left += [str(each) for each in path.iterdir()] if path.exists() else []
        return left + [json.dumps(e)[:300] for e in self.ask({"op": "leases"})["leases"]]


def text_of(path: Path) -> str:
    """A file's text, '' if it is not there."""
    return path.read_text(errors="replace") if path.exists() else ""
