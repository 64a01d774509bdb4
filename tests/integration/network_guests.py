"""Real guests in namespaces: QEMU and libvirt run as the job's user, on a tap that root has made."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from netns_kit import Namespace

from wnodes_core.api import Nic, Port
from wnodes_core.guest.channel import Done
from wnodes_core.model import Image, Job
from wnodes_core.plan import Plan, User

HERE = Path(__file__).parent


class RealGuest:
    """A VM of an ordinary user's in a network namespace; ``start`` begins, ``wait`` waits until it is up."""

    def __init__(
        self, space: Namespace, user: pwd.struct_passwd, image: Image, port: Port | None, nic: Nic | None,
        **more: Any,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wng-", dir="/var/tmp"))
        os.chown(self.folder, user.pw_uid, user.pw_gid)
        job = Job("test", port.lease[:6] if port else "alone", "n0", user.pw_uid, user.pw_gid, user.pw_name)
        plan = Plan(
            lease=f"t-{os.urandom(4).hex()}", folder=str(self.folder), job=job, image=image,
            user=User(user.pw_name, user.pw_uid, user.pw_gid, "/tmp", {}), accel="tcg",
            boot_timeout_s=120, port=port, nic=nic, **{"mounts": (), "cpus": 1, "memory_mib": 384, **more},
        )  # fmt: skip
        path = self.folder / "plan.json"
        path.write_text(json.dumps(plan.to_dict()))
        path.chmod(0o644)
        # A device that every user may open, as udev makes it on any node; here in a mount namespace of our own.
        tun = self.folder / "tun"
        os.mknod(tun, stat.S_IFCHR | 0o666, os.makedev(10, 200))
        tun.chmod(0o666)
        script = 'mount --bind "$1" /dev/net/tun && shift && exec setpriv "$@"'
        become = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
        argv = ["unshare", "-m", "sh", "-c", script, "sh", str(tun), *become]
        argv += [sys.executable, "-I", str(self.readable("network_main.py")), str(path)]
        self.log = (self.folder / "log").open("wb")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        environ = {"HOME": str(self.folder), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.process = space.run(subprocess.Popen, argv, text=True, env=environ, cwd="/", **pipes)

    def readable(self, name: str) -> Path:
        """A copy of a program of the tests that the user may read."""
        shutil.copy(HERE / name, self.folder / name)
        (self.folder / name).chmod(0o644)
        return self.folder / name

    def _heard(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError((self.folder / "log").read_text()[-3000:])
        told: dict[str, Any] = json.loads(line)
        return told

    def wait(self) -> dict[str, float]:
        """Seconds per phase, once it is up."""
        told = self._heard()
        assert "up" in told, (told, (self.folder / "log").read_text()[-3000:])
        return told["up"]

    def run(self, *argv: str) -> str:
        """A command of guest root's: its output. It must succeed."""
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        told = self._heard()
        assert told["code"] == 0, told
        return str(told["out"])

    def ask(self, argv: Sequence[str] | str, **more: Any) -> Done:
        """A command as ``GuestChannel.run`` takes it, or a bash script, however it ends."""
        words = ["bash", "-c", argv] if isinstance(argv, str) else list(argv)
        self.process.stdin.write(json.dumps({"argv": words, **more}) + "\n")
        self.process.stdin.flush()
        told = self._heard()
        return Done(told["code"], told["out"].encode("latin-1"), told["err"].encode("latin-1"))

    def python(self, script: str) -> str:
        return self.run("python3", "-c", script)

    def close(self) -> list[str]:
        """What could not be undone."""
        with suppress(BrokenPipeError):  # it died, and has said why
            self.process.stdin.close()
        try:
            told = json.loads(self.process.stdout.readline() or '{"left": ["it died"]}')
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.log.close()
        shutil.rmtree(self.folder)
        return list(told["left"])
