"""9p in a real guest, whose kernel has it: the storage contract, and what is 9p's own."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from storage_guests import Served, booted  # noqa: E402

from wnodes_core import processes  # noqa: E402
from wnodes_core.model import Image  # noqa: E402
from wnodes_core.testing.storage_devices import BootWith, StorageDevices
from wnodes_core.testing.storage_guest import Job

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def boot_with(full_kernel_image: Image, ordinary_user: Any) -> BootWith:
    return partial(booted, full_kernel_image, ordinary_user)


class TestNinep(StorageDevices):
    provider, name = "wnodes_core.storage.ninep", "9p"
    locks_are_apart = False  # Linux makes a lock of fcntl's out of flock's (fs/9p/vfs_file.c)

    def test_files_held_open_do_not_run_out(self, guest: Served, job: Job, home: Path) -> None:
        """QEMU closes and opens again what a guest holds beyond its own limit."""
        limits = Path(f"/proc/{qemu_of(guest)}/limits").read_text()
        most = int(next(line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")))
        wanted = min(most + 100, 1200)
        program = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.mkdir("held")
held = [os.open("held/%d" % n, os.O_RDWR | os.O_CREAT) for n in range({wanted})]
for n, fd in enumerate(held):
    os.write(fd, b"%d" % n)
print(len(held))
"""
        (home / "hold.py").write_text(program)
        assert job("python3 hold.py") == f"{wanted}\n"
        assert (home / f"held/{wanted - 1}").read_text() == str(wanted - 1)

    def test_qemu_opens_the_folder_as_the_user(self, guest: Served, ordinary_user: Any) -> None:
        status = Path(f"/proc/{qemu_of(guest)}/status").read_text().splitlines()
        ids = {words[0]: set(words[1:]) for words in map(str.split, status) if words}
        assert ids["Uid:"] == {str(ordinary_user.pw_uid)} and ids["CapEff:"] == {"0000000000000000"}

    def test_guest_root_cannot_write_to_what_is_read_only(self, guest: Served, home: Path, ordinary_user: Any) -> None:
        """Not by a mount of its own either: QEMU refuses. Last here, for it takes the contract's mount away."""
        (home / "kept").write_text("kept\n")
        os.chown(home / "kept", ordinary_user.pw_uid, ordinary_user.pw_gid)
        (home / "kept").chmod(0o644)
        done = guest.run(
            "umount /data/ro /run/wnodes/mounts/org.wnodes.mount.1; mkdir -p /again;"
            " mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,access=any wnodes1 /again || exit 9; cd /again; ls;"
            " echo x >new; echo x >>kept; chmod 777 kept; touch -d 2001-01-01 kept; rm kept; ln kept more; mkdir d;"
            " mknod null c 1 3; mv kept gone; chown 0 kept"
        )
        assert b"kept" in done.stdout and done.code != 9, done
        assert done.stderr.count(b"Read-only file system") >= 9, done
        assert ((home / "kept").read_text(), (home / "kept").stat().st_mode & 0o777) == ("kept\n", 0o644)
        assert not {"new", "more", "d", "null", "gone"} & set(os.listdir(home))


def qemu_of(guest: Served) -> int:
    """The pid of a guest's QEMU, known by its lease's folder."""
    folder = str(guest.real.folder)
    (found,) = [p.pid for p in processes.table() if "qemu" in p.exe and any(folder in word for word in p.command)]
    return found
