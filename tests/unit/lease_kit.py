"""A lease's stand for tests: a plan, the fake backend, plain files for disks and mounts, what is left."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from wnodes_core import processes
from wnodes_core.api import hookimpl
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.model import Boot, Disk, Image, Job, Mount, Trace
from wnodes_core.plan import Plan, User
from wnodes_core.plugins import Plugins

FAKE = "wnodes_core.backends.fake"


class Disks:
    """Overlays that are plain files."""

    wnodes_api = 1

    @hookimpl
    def wnodes_disk_create(self, disk: Disk) -> bool:
        Path(disk.path).touch()
        return True

    @hookimpl
    def wnodes_disk_delete(self, disk: Disk) -> bool:
        Path(disk.path).unlink(missing_ok=True)
        return True


class Mounts:
    """Attachments that are files beside the VM; ``argv`` is what the guest runs."""

    wnodes_api = 1

    def __init__(self, argv: list[str], notice: str = "") -> None:
        self.argv, self.notice = argv, notice

    @hookimpl
    def wnodes_mount_attach(self, mount: Mount, socket_path: str, guest: dict[str, Any]) -> dict[str, Any]:
        Path(socket_path + ".gateway").write_text(guest["port"])
        return {"gateway": socket_path + ".gateway", "guest": [{"argv": self.argv}], "notice": self.notice}

    @hookimpl
    def wnodes_mount_detach(self, attachment: dict[str, Any]) -> bool:
        Path(attachment["gateway"]).unlink(missing_ok=True)
        return True


class Stand:
    """One lease to be tried: its plan, its plug-ins, its journal; ``said`` is what the user was told."""

    def __init__(self, folder: Path) -> None:
        job = Job("local", "7", "n0", os.getuid(), os.getgid(), "ann")
        image = Image("deb", "1", "sha256:0", "/base", "raw", boot=Boot("/kernel", cmdline=""))
        # No home: the fake guest's nobody could not give it away.
        user = User("ann", os.getuid(), os.getgid(), "", {"staff": 50})
        self.plan = Plan("t-1", str(folder), job, image, user, "tcg", 1, 128, (), boot_timeout_s=20)
        self.plan = replace(self.plan, lease=f"t-{os.urandom(4).hex()}")
        self.folder = folder
        self.plugins = Plugins(builtins=(FAKE,), scan=False)
        self.plugins.register(Disks(), "disks")
        self.said: list[str] = []
        self.trace = Trace()

    def fault(self, fault: str, **changes: Any) -> None:
        image = replace(self.plan.image, boot=Boot("/kernel", cmdline=f"console=ttyS0 fault={fault}"))
        self.plan = replace(self.plan, image=image, **changes)

    def mount(self, *argv: str, notice: str = "", count: int = 1) -> None:
        self.plugins.register(Mounts(list(argv or ["true"]), notice), "mounts")
        self.plan = replace(self.plan, mounts=tuple(Mount("/data", f"/mnt/{n}") for n in range(count)))

    def go(self, use: Callable[[Lifecycle, Running], Any] | None = None) -> list[Exception]:
        """Start, let ``use`` have it, and stop, as a keeper does."""
        journal = Journal(self.folder / "journal")
        lifecycle = Lifecycle(self.plan, journal, self.plugins.hook, self.trace, self.said.append)

        async def live() -> None:
            running = await lifecycle.start()
            try:
                if use is not None:
                    await use(lifecycle, running)
            finally:
                running.channel.close()
                await asyncio.sleep(0)

        try:
            asyncio.run(live())
        finally:
            self.errors = lifecycle.stop()
            journal.close()
        return self.errors

    def lines(self) -> list[str]:
        text = (self.folder / "journal").read_text()
        return [f"{line['op']} {line['kind']}" for line in map(json.loads, filter(None, text.splitlines()))]

    def processes(self) -> list[str]:
        mark = str(self.folder)
        return [" ".join(p.command) for p in processes.table() if mark in " ".join(p.command) and processes.alive(p)]

    def left(self) -> list[str]:
        found = self.processes()
        found += [str(path) for path in self.folder.glob("overlay*")] + [str(p) for p in self.folder.glob("*.gateway")]
        journal = Journal(self.folder / "journal")
        found += [str(resource) for resource in journal.open_resources]
        journal.close()
        return found
