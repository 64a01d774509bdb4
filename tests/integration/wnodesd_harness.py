"""Starts a real wnodesd (as root, on sockets of its own) and its actors, and looks at what is left."""

from __future__ import annotations

import http.client
import json
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from wnodes_core import processes
from wnodes_core.agent import client

HERE = Path(__file__).parent
UID = 12345  # needs no account
PATIENCE_S = 15.0


def make_python(folder: Path) -> str:
    """A Python that every user may read, with our packages: wnodesd undoes as the job's user."""
    import pluggy
    import prometheus_client

    import wnodes_core

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(Path(folder).glob("lib/python3*/site-packages"))
    for package in (wnodes_core, pluggy, prometheus_client):
        source = Path(package.__file__).parent
        shutil.copytree(source, site / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return f"{folder}/bin/python"


@pytest.fixture(name="python", scope="session")
def python_fixture():
    folder = Path(tempfile.mkdtemp(prefix="wnd-py-"))
    folder.chmod(0o755)
    yield make_python(folder)
    shutil.rmtree(folder)


@pytest.fixture(name="node")
def node_fixture(python):
    node = Node(python)
    yield node
    node.close()


def until(true, what: str):
    """Wait for something that no event announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := true()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)
    return value


class Node:
    """One worker node of the tests: folders, daemon, steps."""

    def __init__(self, python: str) -> None:
        self.python = python
        self.folder = Path(tempfile.mkdtemp(prefix="wnd-"))
        self.folder.chmod(0o755)
        self.actors = self.folder / "actors.py"
        shutil.copy(HERE / "wnodesd_actors.py", self.actors)
        self.live = self.folder / "live"
        self.live.write_text("")
        self.state, self.run = self.folder / "state", self.folder / "run"
        self.socket = str(self.run / "wnodesd.sock")
        self.log = self.folder / "log"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.steps: list[Step] = []
        self.prefix: list[str] = []  # of the daemon's argv

    def start(self, *, ready: bool = True, **config) -> None:
        places = {"state_dir": str(self.state), "run_dir": str(self.run), "live": str(self.live)}
        path = self.folder / "config.json"
        path.write_text(json.dumps({**places, "slow": str(self.folder / "slow"), **config}))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, self.log.open("ab") as log:
            told.bind(str(self.folder / f"notify{time.monotonic_ns()}"))
            environ = {"NOTIFY_SOCKET": told.getsockname(), "PATH": "/usr/bin:/bin"}
            argv = [*self.prefix, self.python, "-I", HERE / "wnodesd_main.py", path]
            self.daemon = subprocess.Popen(argv, stderr=log, env=environ)
            if ready:
                told.settimeout(PATIENCE_S)
                assert told.recv(100) == b"READY=1"

    def kill(self) -> None:
        self.daemon.kill()
        self.daemon.wait(PATIENCE_S)

    def call(self, **request):
        return client.call(request, path=self.socket, timeout_s=PATIENCE_S)

    def prepare(self, job_id: str = "7", image: str = "known", network: str = "", scratch_mib: int | None = None, **more):
        mounts = more.pop("mounts", ())
        job = {"lrms": "fake", "job_id": job_id, "node": "n0", "uid": UID, "gid": UID, "user": "u", **more}
        request = {"image": image, "network": network, "scratch_mib": scratch_mib, "mounts": mounts}
        return self.call(op="prepare", lrms="fake", request=request, job=job)["lease"]

    def finish(self, job_id: str = "7"):
        return self.call(op="finish", lrms="fake", job_id=job_id, node="n0")

    def leases(self):
        return self.call(op="leases")["leases"]

    def state_of(self, lease: str) -> str:
        return next((each["state"] for each in self.leases() if each["id"] == lease), "")

    def scrape(self, path: str = "/metrics") -> tuple[int, str]:
        """Status and text of what the daemon says to a scraper."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.run / "metrics.sock"))
        connection.request("GET", path)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, text

    def step(self, job_id: str = "7", kind: str = "long") -> Step:
        self.steps.append(Step(self, f"fakejob={job_id}:{kind}"))
        return self.steps[-1]

    def left(self) -> list[str]:
        """What the daemon left: lease folders, journals, markers, marks."""
        places = ("state/leases", "state/journal", "run/fake", "state/marks")
        return [str(p) for place in places for p in (self.folder / place).glob("*")]

    def close(self) -> None:
        if self.daemon and self.daemon.poll() is None:
            self.kill()
        for step in self.steps:
            step.close()
        print(self.log.read_text())  # pytest shows it with a failure
        remove(self.folder)


def remove(folder: Path) -> None:
    """Remove a node's folder; a child that a killed daemon was waiting for (its probe) may still write there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Step:
    """A root-owned step daemon that forks launchers as a user."""

    def __init__(self, node: Node, word: str) -> None:
        argv = ["/usr/bin/python3", "-I", node.actors, "step", word, node.socket]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(argv, **pipes, start_new_session=True)
        self.heard: queue.Queue[dict] = queue.Queue()
        self.pids: list[int] = []  # grows while it is read
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                said = json.loads(line)
                self.pids += [said["pid"], said.get("child", said["pid"])]
                self.heard.put(said)

    def launch(self, *, count: int = 1, how: str = "normal", uid: int = UID) -> None:
        command = {"count": count, "how": how, "uid": uid}
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def next(self) -> dict:
        return self.heard.get(timeout=PATIENCE_S)

    def expect(self, *keys: str) -> dict[str, dict]:
        """Messages until each key has come, in any order."""
        found: dict[str, dict] = {}
        while set(found) < set(keys):
            said = self.next()
            found.update({key: said for key in keys if key in said})
        return found

    def child_if_any(self) -> int:
        """The keeper's child, or 0 as soon as launcher or keeper were let down."""
        while True:
            said = self.next()
            if "child" in said:
                return said["child"]
            answer = said.get("reply" if said["role"] == "launcher" else "hold")
            if not answer or not answer.get("ok"):
                return 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        for pid in self.pids:
            process = processes.read(pid)
            if process and process.uid == UID:  # ours: nobody else runs as this uid
                processes.kill(process)


def ended(pid: int, timeout_s: float = PATIENCE_S) -> bool:
    """Wait for a process that is not our child to end."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)
