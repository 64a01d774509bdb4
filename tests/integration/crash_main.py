"""``wnodes`` with a journal that kills on order: the crash tests' own main, as launcher and as keeper.

``python -I crash_main.py ORDERS.json WNODES-ARGUMENTS…``; the keeper is this file too. Production
code knows nothing of any of this. Orders (JSON): ``root`` (folder of leases), ``ledger`` (a file that
gets each journal line and each process), ``fake`` (the fake backend), ``victim`` (``keeper``,
``launcher``, ``both``, ``vm``, ``disk`` for the space in root, or ''), ``line`` (from 1), ``when``
(``before``, ``after``) and ``delay_s`` (so long after the line, but before the next one).
"""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from wnodes_core import embedded, keeper, processes
from wnodes_core.api import hookimpl
from wnodes_core.files import private_folder
from wnodes_core.journal import Journal
from wnodes_core.model import Process
from wnodes_core.plugins import Plugins
from wnodes_core.storage import sshfs

KEEPER = "--as-keeper"
EXECVE = os.execve


class FakeMount:
    """The real gateway, and a guest that needs no mount(8) to see its files."""

    wnodes_api = 1

    @staticmethod
    @hookimpl
    def wnodes_mount_attach(mount, socket_path, guest):
        return sshfs.wnodes_mount_attach(mount, socket_path, guest, "sshfs") | {"guest": [{"argv": ["true"]}]}

    @staticmethod
    @hookimpl
    def wnodes_mount_detach(attachment):
        return sshfs.wnodes_mount_detach(attachment)


class Scene:
    """The orders, and what they need to know of the play."""

    def __init__(self, path):
        self.path = path
        self.__dict__.update(json.loads(Path(path).read_text()))
        self.lines = 0
        self.launcher = os.getppid()
        self.vm = None

    def note(self, **facts):
        with open(self.ledger, "a") as file:
            file.write(json.dumps(facts) + "\n")

    def note_process(self, kind, pid, started=None):
        started = started or processes.read(pid).started
        self.note(process=kind, pid=pid, started=started)

    def strike(self):
        if self.victim in ("launcher", "both"):
            os.kill(self.launcher, signal.SIGKILL)
        if self.victim == "disk":
            self.fill()
        if self.victim == "vm" and self.vm is not None:
            processes.kill(self.vm)
        if self.victim in ("keeper", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

    def fill(self):
        """Leave no byte on the file system of the leases."""
        with suppress(OSError), open(f"{self.root}/.filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass


def deadly_journal(scene):
    class DeadlyJournal(Journal):
        def _append(self, op, resource):
            scene.lines += 1
            self.learn(resource)
            due = scene.lines == scene.line
            if (due and scene.when == "before") or (scene.delay_s and scene.lines == scene.line + 1):
                scene.strike()
            super()._append(op, resource)
            scene.note(line=f"{op} {resource.kind}")
            if due and scene.when == "after":
                threading.Timer(scene.delay_s, scene.strike).start() if scene.delay_s else scene.strike()

        def learn(self, resource):
            attachment = resource.data.get("attachment")
            if attachment and attachment["process"]:  # a device's guest half has none
                scene.note_process("gateway", **attachment["process"])
            if resource.kind == "vm" and "pid" in resource.data:
                pid, started = resource.data["pid"], resource.data["started"]
                scene.vm = Process(pid, 0, 0, started, "", ())
                scene.note_process("vm", pid, started)

    return DeadlyJournal


def set_the_stage(scene):
    embedded.leases_root = lambda: private_folder(scene.root)
    if scene.fake:
        fakes = ("wnodes_core.backends.fake", "wnodes_core.images.sources", "wnodes_core.images.disks", "fake_mount")
        sys.modules["fake_mount"] = FakeMount
        Plugins.__init__.__kwdefaults__.update(builtins=fakes, scan=False)


def become_us(scene):
    """The launcher execs a keeper: have it exec ours."""

    def execve(program, argv, environ):
        assert argv[-1] == "wnodes_core.keeper", argv
        EXECVE(program, [program, "-I", __file__, scene.path, KEEPER], environ)

    os.execve = execve


def main():
    scene = Scene(sys.argv.pop(1))
    set_the_stage(scene)
    if sys.argv[1:] == [KEEPER]:
        scene.note_process("keeper", os.getpid())
        keeper.Journal = deadly_journal(scene)
        return keeper.main()
    if sys.argv[1:] == ["sweep"]:
        embedded.warn(embedded.sweep())
        return 0
    become_us(scene)
    from wnodes_core.cli import main as wnodes

    return wnodes()


if __name__ == "__main__":
    sys.exit(main())
