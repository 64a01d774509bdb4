"""What the benchmarks stand on: built images, an ordinary user, one guest at a time."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wnodes_core.command import PATH
from wnodes_core.images.store import Store
from wnodes_core.model import Boot, Image
from wnodes_core.plugins import Plugins

WORK = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"))
USER = "wnodes-t1"
CPUS, MEMORY_MIB = 2, 1024


class CannotRun(Exception):
    """What this benchmark needs is not here; the words say how to get it."""


def image(kind: str) -> Image:
    """A built image, ``minimal`` or ``cloud``. Raises CannotRun."""
    folder = WORK / "images" / kind
    try:
        entry = yaml.safe_load((folder / "image.yaml").read_text())
    except FileNotFoundError:
        raise CannotRun(f"no image in {folder}: run scripts/build-image {folder} --kind {kind}") from None
    boot = Boot(str(folder / "vmlinuz"), str(folder / "initrd"), entry["boot"]["cmdline"])
    return Image(
        name=entry["name"],
        tag="latest",
        digest=entry["digest"],
        path=str(folder / "disk.qcow2"),
        format="qcow2",
        arch="x86_64",
        boot=boot,
        facts=entry["facts"],
    )


@contextmanager
def one_guest() -> Iterator[None]:
    """Two emulated guests on two cores starve each other; the tests hold the same lock."""
    with open(Path(tempfile.gettempdir(), "wnodes-test-guest.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Ground:
    """A folder of the ordinary user's, and a configuration whose store holds the images."""

    folder: Path
    config: Path
    user: pwd.struct_passwd

    def argv(self, *words: str) -> list[str]:
        """The ``wnodes`` command with these words."""
        return [str(Path(sys.executable).with_name("wnodes")), *words]

    def popen(self, argv: Sequence[str | Path], **pipes: Any) -> subprocess.Popen[bytes]:
        """Start a program as the user."""
        entry = self.user
        environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": entry.pw_dir, "WNODES_CONFIG": str(self.config)}
        identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        return subprocess.Popen(argv, env=environ, cwd="/", **identity, **pipes)


@contextmanager
def ground(*kinds: str) -> Iterator[Ground]:
    """The images of these kinds in a store, ready for ``wnodes run`` as the user. Raises CannotRun."""
    if os.getuid():
        raise CannotRun("want root: it starts guests as an ordinary user and measures both")
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
        user = pwd.getpwnam(USER)
    # A short name: sockets below it have 107 bytes for their whole path.
    folder = Path(tempfile.mkdtemp(prefix="wnb-", dir="/var/tmp"))
    try:
        os.chown(folder, user.pw_uid, user.pw_gid)
        store = Store(folder / "images", Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
        for kind in kinds:
            built = image(kind)
            boot = built.boot
            assert boot is not None
            files = {"kernel": boot.kernel, "initrd": boot.initrd, "cmdline": boot.cmdline}
            store.add(built.path, built.name, facts=dict(built.facts), **files)
        subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", folder / "images"], check=True)
        config = folder / "wnodes.yaml"
        config.write_text(f"accel: tcg\nimages:\n  folder: {folder}/images\n")
        yield Ground(folder, config, user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def slurm_site(built: Image, prefix: str, **more: Any) -> Any:
    """The tests' own site: a real Slurm on loopback with our hooks installed, wnodesd, the image. Raises CannotRun."""
    if os.getuid():
        raise CannotRun("want root: it starts a Slurm of its own")
    missing = [program for program in ("slurmctld", "slurmd", "munged", "gcc") if not shutil.which(program, path=PATH)]
    if missing:
        raise CannotRun(f"no {', '.join(missing)}: run scripts/setup")
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integration"))
    try:
        from slurm_site import Site
    finally:
        sys.path.pop(0)
    return Site(built, prefix, cgroup=False, **more)
