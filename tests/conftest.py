"""Guards over every test, and fixtures by stage of life: image, user, booted guest, nothing left."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from wnodes_core import processes
from wnodes_core.model import Boot, Image
from wnodes_core.testing.site import make_user

settings.register_profile("untimed", deadline=None)  # on a busy machine everything may take long
settings.load_profile("untimed")

HERE = Path(__file__).parent
WORK = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"))
USER = "wnodes-t1"
HELPERS = ("qemu-system", "sftp-server", "wnodes", "slurmstepd")


@pytest.fixture(autouse=True)
def environment_does_not_leak() -> Iterator[None]:
    """Every test ends with the environment, umask and folder that it began with."""
    before, folder = dict(os.environ), os.getcwd()
    mask = os.umask(0o022)
    os.umask(mask)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    found = os.umask(mask)
    after.pop("PYTEST_CURRENT_TEST", None)
    before.pop("PYTEST_CURRENT_TEST", None)
    assert after == before, "the test changed the environment: use monkeypatch"
    assert found == mask, f"the test left umask {found:o}"
    assert os.getcwd() == folder, "the test changed the working folder: use monkeypatch.chdir"


@pytest.fixture(scope="session")
def minimal_image() -> Image:
    """Our small guest as scripts/build-image made it. Fails, and does not skip, if it is not there."""
    return _built("minimal", "debian12", "builtin")


@pytest.fixture(scope="session")
def full_kernel_image(minimal_image: Image) -> Image:
    """Our small guest with Debian's full kernel, which has 9p."""
    folder = WORK / "images/kernel"
    if not (folder / "recipe").exists():
        pytest.fail(f"no kernel in {folder}: run scripts/build-image {folder} --kind kernel, or scripts/test")
    assert minimal_image.boot is not None
    boot = replace(minimal_image.boot, kernel=str(folder / "vmlinuz"), initrd=str(folder / "initrd"))
    return replace(minimal_image, name="debian12-full-kernel", boot=boot)


@pytest.fixture(scope="session")
def cloud_image() -> Image:
    """The ordinary cloud image, with nothing of ours in it."""
    return _built("cloud", "debian12-cloud", "qemu-ga")


def _built(kind: str, name: str, agent: str) -> Image:
    folder = WORK / "images" / kind
    if not (folder / "recipe").exists():
        pytest.fail(f"no image in {folder}: run scripts/build-image {folder} --kind {kind}, or scripts/test")
    lines = dict(line.strip().partition(": ")[::2] for line in (folder / "image.yaml").read_text().splitlines())
    boot = Boot(str(folder / "vmlinuz"), str(folder / "initrd"), lines["cmdline"].strip('"'))
    return Image(
        name=name,
        tag="latest",
        digest=lines["digest"],
        path=str(folder / "disk.qcow2"),
        format="qcow2",
        arch="x86_64",
        boot=boot,
        facts={"os": "debian12", "agent": agent},
    )


@pytest.fixture(scope="session")
def leases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of leases of one state folder: what libvirt learns of QEMU for the first VM (3 s), the next recall."""
    folder = tmp_path_factory.mktemp("state") / "leases"
    folder.mkdir()
    return folder


@pytest.fixture
def lease_folder(leases: Path) -> Path:
    """A folder as a lease of root's has it, for one VM."""
    return Path(tempfile.mkdtemp(dir=leases))


@pytest.fixture(scope="session")
def image_store(minimal_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store that holds the small guest as ``debian12:latest``."""
    from wnodes_core.images.store import Store
    from wnodes_core.plugins import Plugins

    store = Store(tmp_path_factory.mktemp("store"), Plugins(scan=False).hook)
    boot = minimal_image.boot
    assert boot is not None
    store.add(minimal_image.path, "debian12", kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)
    return store


@pytest.fixture(scope="session")
def ordinary_user() -> pwd.struct_passwd:
    """An account without any right, with a home of its own. Made once, left for the next run."""
    if os.getuid():
        pytest.fail("tests of other users' rights want root: run scripts/test as root")
    return pwd.getpwnam(make_user(USER))


def helpers_now() -> dict[tuple[int, int], str]:
    """Processes of the kinds that a lease starts: (pid, birth) -> command line."""
    return {
        (p.pid, p.started): " ".join(p.command)
        for p in processes.table()
        if p.command and any(word in Path(p.command[0]).name or word in p.exe for word in HELPERS)
    }


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """A folder for one test's leases; at its end no process, mount or socket may refer to it.

    Only what names the folder counts, so that other work on this machine does not disturb.
    """
    yield tmp_path
    mark = str(tmp_path)
    left = [f"process {pid}: {text}" for (pid, _), text in helpers_now().items() if mark in text]
    left += [f"mount: {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if mark in line]
    left += [f"socket: {line}" for line in Path("/proc/net/unix").read_text().splitlines() if mark in line]
    assert not left, "\n".join(left)


@pytest.fixture(scope="module")
def guest(minimal_image: Image) -> Iterator[Any]:
    """A booted guest of the small image with a connected channel, for all tests of a module."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("guests", HERE / "guests.py")
    assert spec is not None and spec.loader is not None
    guests = sys.modules.setdefault("guests", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(guests)
    booted = guests.Guest(minimal_image)
    yield booted
    booted.close()


@pytest.fixture
def guest_channel(guest: Any) -> Any:
    """The channel alone."""
    return guest.channel
