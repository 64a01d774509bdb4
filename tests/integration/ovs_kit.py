"""An Open vSwitch of the test's own, in user space, in a network namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netns_kit import Namespace

SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


class Switch:
    """ovsdb-server and ovs-vswitchd in a namespace; ``here`` makes it the one that programs talk to."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.folder = Path(tempfile.mkdtemp(prefix="wno-"))
        self.environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **{name: str(self.folder) for name in ("OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR")}}
        self.started: list[subprocess.Popen[bytes]] = []
        subprocess.run(["ovsdb-tool", "create", self.folder / "conf.db", SCHEMA], check=True, env=self.environ)
        self._start("ovsdb-server", f"--remote=punix:{self.folder}/db.sock", str(self.folder / "conf.db"))
        self._wait_for("db.sock")
        self.vsctl("--no-wait", "init")
        self._start("ovs-vswitchd", f"unix:{self.folder}/db.sock", f"--pidfile={self.folder}/ovs-vswitchd.pid")
        self._wait_for("ovs-vswitchd.pid")

    def _start(self, *argv: str) -> None:
        log = (self.folder / f"{argv[0]}.log").open("wb")
        with log:
            self.started.append(self.space.run(subprocess.Popen, argv, env=self.environ, stdout=log, stderr=log))

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 10
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, [path.read_text() for path in self.folder.glob("*.log")]
            time.sleep(0.02)

    def vsctl(self, *words: str) -> str:
        argv = ["ovs-vsctl", "--timeout=10", *words]
        done = self.space.run(subprocess.run, argv, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, (argv, done.stderr)
        return str(done.stdout)

    def restart(self) -> None:
        """The switch dies and comes back; its data base lives on, its rules do not."""
        self.started[1].kill()
        self.started.pop().wait()
        (self.folder / "ovs-vswitchd.pid").unlink()
        self._start("ovs-vswitchd", f"unix:{self.folder}/db.sock", f"--pidfile={self.folder}/ovs-vswitchd.pid")
        self._wait_for("ovs-vswitchd.pid")
        bridges = self.vsctl("list-br").split()
        deadline = time.monotonic() + 10
        while any(self._ask("ovs-ofctl", "show", bridge).returncode for bridge in bridges):
            assert time.monotonic() < deadline, "the switch does not come back"
            time.sleep(0.02)

    def _ask(self, *argv: str) -> Any:
        return self.space.run(subprocess.run, argv, env=self.environ, capture_output=True)

    @contextmanager
    def here(self) -> Any:
        """Within the block programs of this process talk to this switch."""
        os.environ["OVS_RUNDIR"] = str(self.folder)
        try:
            yield
        finally:
            del os.environ["OVS_RUNDIR"]

    def run(self, function: Any, *args: Any) -> Any:
        with self.here():
            return self.space.run(function, *args)

    def close(self) -> None:
        for process in reversed(self.started):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder)
