"""A command whose work is a mount: when it is over, and what is told when nothing gets mounted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.guest import guest_mounts

_spec = importlib.util.spec_from_file_location("guest_kit", Path(__file__).with_name("guest_kit.py"))
assert _spec is not None and _spec.loader is not None
guest_kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guest_kit)

MOUNTINFO = rb"""21 24 0:5 / /dev rw,relatime - devtmpfs devtmpfs rw
30 24 0:26 / /a\040b\134c rw,nosuid shared:3 - fuse.sshfs :/x rw
31 30 0:27 / /a\040b\134c rw - tmpfs tmpfs rw
"""

# In a mount namespace of its own, where nobody sees what it mounts.
WATCHES = """
import os, select, subprocess, sys
from wnodes_core.guest import guest_mounts
from wnodes_core.guest.guest_mounts import Awaited
top = sys.argv[1]
if sys.argv[2] == "mount(8)":
    guest_mounts._bind_by_call = lambda *_: False
def mount(folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev", "tmpfs", folder], check=True)
def changed(awaited, wait_ms=0):
    poll = select.poll()
    poll.register(awaited.fd, select.POLLIN)
    return bool(poll.poll(wait_ms))
mount(top)
os.mkdir(top + "/real")
os.symlink("real", top + "/link")
awaited = Awaited(top + "/link/stage", top + "/link/new folder", True)
assert awaited.show() == "it ended and left nothing mounted"
mount(top + "/real/stage")
assert changed(awaited, 2000) and awaited.there()
open(top + "/real/stage/file", "w").close()
assert awaited.show() == "" and os.listdir(top + "/real/new folder") == ["file"]
try:
    open(top + "/real/new folder/other", "w")
    assert False, "it is to be read-only"
except OSError as error:
    assert error.errno == 30
subprocess.run(["umount", "-l", top + "/real/stage"], check=True)
assert os.listdir(top + "/real/new folder") == ["file"], "the job's view went with the program's"
again = Awaited(top + "/real/new folder", top + "/t", False)
assert not again.there() and not changed(again), "it counted what was there before"
mount(top + "/real")
assert changed(again, 2000) and not again.there(), "a mount elsewhere is not ours"
os.rmdir(top + "/t")
mount(top + "/real/")
os.mkdir(top + "/real/s")
gone = Awaited(top + "/real/s", top + "/t", False)
mount(top + "/real/s")
os.rmdir(top + "/t")
assert top + "/t" in gone.show()
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The agent behind a channel, without a VM."""
    kit = guest_kit.Kit(tmp_path_factory.mktemp("vm"))
    try:
        yield kit.start()
    finally:
        kit.close()


def at(target: Path) -> dict[str, Any]:
    return {"stage": f"{target}-stage", "target": str(target), "read_only": False}


def test_mounts_are_counted_at_the_very_folder() -> None:
    count = guest_mounts.mounts_at
    assert count(MOUNTINFO, b"/a b\\c") == ["0:26", "0:27"]
    assert count(MOUNTINFO, b"/dev") == ["0:5"]
    assert count(MOUNTINFO, b"/a") == count(MOUNTINFO, b"/dev/shm") == []


@pytest.mark.parametrize("way", ["mount(2)", "mount(8)"])
def test_a_new_mount_is_seen_and_shown(tmp_path: Path, way: str) -> None:
    argv = ["unshare", "-m", sys.executable, "-c", WATCHES, str(tmp_path), way]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


def test_a_command_that_fails_says_why(kit: Any, tmp_path: Path) -> None:
    done = kit.call(kit.channel.run(["sh", "-c", "echo no answer >&2; exit 3"], mount=at(tmp_path / "new/folder")))
    assert (done.code, done.stderr) == (3, b"no answer\n")
    assert (tmp_path / "new/folder").is_dir()


def test_a_command_that_mounts_nothing_has_failed(kit: Any, tmp_path: Path) -> None:
    done = kit.call(kit.channel.run(["true"], mount=at(tmp_path)))
    assert done.code == 1 and b"nothing mounted" in done.stderr


def test_a_port_that_is_not_there_is_named(kit: Any, tmp_path: Path) -> None:
    done = kit.call(kit.channel.run(["true"], port="org.wnodes.mount.77", mount=at(tmp_path)))
    assert done.code == 127 and (b"org.wnodes.mount.77" in done.stderr or b"virtio-ports" in done.stderr)


def test_a_target_that_cannot_be_made_is_named(kit: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = kit.call(kit.channel.run(["true"], mount=at(tmp_path / "file/x")))
    assert done.code == 126 and b"/file: " in done.stderr
