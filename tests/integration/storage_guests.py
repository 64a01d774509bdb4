"""VMs of an ordinary user's that have mounts as devices, for the storage contract."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netns_kit import Namespace
from network_guests import RealGuest

from wnodes_core.guest.channel import Done
from wnodes_core.model import Image, Job, Mount, Template
from wnodes_core.plan import Plan, User
from wnodes_core.templates.shelf import MADE


class Served:
    """A guest as the contract asks for one, its VM started by the real lifecycle; it has no NIC."""

    def __init__(self, real: RealGuest) -> None:
        self.real = real

    def run(self, argv: Sequence[str] | str, **more: Any) -> Done:
        """As ``GuestChannel.run``; text is a bash script."""
        return self.real.ask(argv, **more)


@contextmanager
def booted(
    image: Image, user: pwd.struct_passwd, mounts: tuple[Mount, ...], provider: str, template: Template | None = None
) -> Iterator[Served]:
    """One, a clone of the template's if there is one, until the end of the context; then nothing of it may be left.

    A clone has more memory than its template, so that what is plugged in is memory of its mounts' too.
    """
    more = {"template": template, "memory_mib": 640} if template else {}
    guest = RealGuest(Namespace(), user, image, None, None, mounts=mounts, storage=(provider, "sshfs"), **more)
    try:
        phases = guest.wait()
        assert ("clone" in phases, "boot" in phases) == (bool(template), not template), phases
        yield Served(guest)
    finally:
        left = guest.close()
    assert left == []


@contextmanager
def template_of(image: Image, user: pwd.struct_passwd) -> Iterator[Template]:
    """A template that the user has built, for clones with up to four mounts."""
    folder = Path(tempfile.mkdtemp(prefix="wnt-", dir="/var/tmp"))
    os.chown(folder, user.pw_uid, user.pw_gid)
    job = Job("test", "template", "n0", user.pw_uid, user.pw_gid, user.pw_name)
    who = User(user.pw_name, user.pw_uid, user.pw_gid, "/tmp", {})
    plan = Plan(f"t-{os.urandom(4).hex()}", str(folder), job, image, who, "tcg", 1, 384, (), 120, mount_ports=4, most_mib=1024)
    given = json.dumps({"plan": plan.to_dict(), "id": "t-1", "ways": ["mapped"]}).encode()
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    argv = [*become, sys.executable, "-I", "-m", "wnodes_core.templates.build"]
    environ = {"HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        done = subprocess.run(argv, input=given, capture_output=True, timeout=200, env=environ, cwd="/")
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        yield Template.from_dict(json.loads((folder / MADE).read_text()))
    finally:
        shutil.rmtree(folder)
