"""Guest root against the host's files, and faults under a running job: the last part of the storage contract."""

from __future__ import annotations

import importlib
import os
import pwd
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wnodes_core.testing.storage_guest import Job, MountIt, StorageGuestContract
from wnodes_core.tools import run

_SOON_S = 10.0


class StorageAttacks(StorageGuestContract):
    """All of ``StorageGuestContract``, then what must not work, whatever serves the files.

    ``root_is_the_user``: what the guest's root makes is the job's user's; else it may make nothing.
    """

    root_is_the_user: bool = True

    # Guest root is nobody special: the host sees the job's user.

    def test_files_of_others_stay_closed(self, job: Job, home: Path) -> None:
        (home / "roots").write_text("secret")
        os.chmod(home / "roots", 0o600)
        for root in (False, True):
            assert "Permission denied" in job("cat roots", code=1, root=root)
            assert "Permission denied" in job("echo x >>roots", code=1, root=root)
        assert (home / "roots").read_text() == "secret"

    def test_guest_root_makes_no_device_and_nothing_of_roots(
        self, job: Job, home: Path, ordinary_user: pwd.struct_passwd
    ) -> None:
        job("mkdir evil; touch evil/old")
        made = "cp /bin/true suid; chown 0:0 suid; chmod 6755 suid; touch file; chown 1:1 file old; chown 0:0 ."
        job(f"cd evil; mknod null c 1 3; mknod disk b 8 0; mkfifo fifo; {made}; true", root=True)
        assert (home / "evil/file").exists() is self.root_is_the_user
        for path in (home / "evil", *(home / "evil").iterdir()):
            found = path.lstat()
            assert not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode), path
            assert (found.st_uid, found.st_gid) == (ordinary_user.pw_uid, ordinary_user.pw_gid), path

    def test_setuid_programs_and_devices_of_the_host_give_nothing(
        self, guest: Any, job: Job, home: Path, request: Any
    ) -> None:
        run(["mknod", "-m", "666", str(home / "zero"), "c", "1", "5"])
        request.addfinalizer((home / "zero").unlink)
        assert "ermission denied" in job("head -c 4 zero", code=1, root=True)
        mounted = [line.split() for line in guest.run("cat /proc/self/mountinfo").stdout.decode().splitlines()]
        options = [words[5].split(",") for words in mounted if words[4].endswith("né:e")]
        assert options and all({"nosuid", "nodev"} <= set(each) for each in options)

    def test_links_lead_nowhere_outside(self, job: Job, home: Path, top: Path) -> None:
        out = job(f"ln -s {top}/secret door; ln -s ../secret back; ln -s / all; cat door back all{top}/secret ../secret"
                  f"; ln {top}/secret hard; ln ../secret hard2; ls -A ..; true", root=True)  # fmt: skip
        assert "not for the guest" not in out
        assert (top / "secret").stat().st_nlink == 1
        for name in ("door", "back", "all"):
            (home / name).unlink(missing_ok=True)

    def test_a_folder_that_turns_into_a_link_leads_nowhere(self, job: Job, home: Path, top: Path) -> None:
        """The race: the guest has looked a path up, and on the host a folder of it becomes a link out."""
        (home / "turn").mkdir()
        (home / "turn/secret").write_text("harmless")
        assert job("cat turn/secret") == "harmless"
        os.rename(home / "turn", home / "turned")
        os.symlink(top, home / "turn")
        for _ in range(3):
            assert "not for the guest" not in job("cat turn/secret; echo x >turn/new; true", root=True)
        assert not (top / "new").exists()
        os.unlink(home / "turn")

    def test_a_source_that_vanishes_is_an_error(
        self, guest: Any, mount_it: MountIt, folder_of: Callable[[str], Path], top: Path
    ) -> None:
        source = folder_of("vanishing")
        (source / "file").write_text("x")
        mount_it(source, "/vanishing")
        assert guest.run("cat /vanishing/file").stdout == b"x"
        (source / "file").unlink()
        source.rmdir()
        done = guest.run(
            "sleep 2; timeout 5 cat /vanishing/file; echo code $?; timeout 5 touch /vanishing/new; echo code $?"
        )
        assert done.stdout == b"code 1\ncode 1\n", done


class StorageFaults(StorageAttacks):
    """All of ``StorageAttacks``, then what must fail well where each mount has a gateway of its own."""

    def test_files_held_open_run_out_with_an_error_and_come_back(
        self, guest: Any, mount_it: MountIt, folder_of: Callable[[str], Path]
    ) -> None:
        mount_it(folder_of("many"), "/many", open_files=64)
        program = """
import os
held = []
try:
    while len(held) < 200:
        held.append(os.open("/many/%d" % len(held), os.O_RDWR | os.O_CREAT))
except OSError as error:
    print("error after", len(held))
"""
        said = guest.run(["python3", "-c", program]).stdout.decode()
        assert said.startswith("error after ") and 20 < int(said.split()[-1]) < 64, said
        assert guest.run("rm /many/*; echo again >/many/after; cat /many/after").stdout == b"again\n"

    def test_two_mounts_side_by_side_and_one_dies(
        self, guest: Any, mount_it: MountIt, folder_of: Callable[[str], Path], ordinary_user: pwd.struct_passwd
    ) -> None:
        who = {"uid": ordinary_user.pw_uid, "gid": ordinary_user.pw_gid}
        dying, living = folder_of("dying"), folder_of("living")
        made = mount_it(dying, "/dying")
        mount_it(living, "/living")
        writer = "nohup sh -c 'while echo line; do sleep 0.02; done >/dying/log 2>/tmp/err; echo over >/tmp/over'"
        assert guest.run(f"{writer} >/dev/null 2>&1 & sleep 0.5", **who).code == 0
        assert _soon(lambda: (dying / "log").exists() and (dying / "log").stat().st_size > 0)
        os.kill(made["process"]["pid"], signal.SIGKILL)
        began = time.monotonic()
        done = guest.run(
            "until [ -e /tmp/over ]; do sleep 0.05; done; cat /tmp/err; echo x >/dying/new; ls /dying", **who
        )
        assert time.monotonic() - began < _SOON_S, "the job hung"
        assert b"error" in done.stderr or b"not connected" in done.stderr, done
        assert b"not connected" in guest.run("ls /dying", **who).stderr, "what lies below the mount came to light"
        assert set((dying / "log").read_text().splitlines()) == {"line"}, "what was written is not corrupt"
        assert guest.run("echo y >/living/file", **who).code == 0
        assert (living / "file").read_text() == "y\n"

    def test_a_stopped_gateway_hangs_its_own_files_only(
        self, guest: Any, mount_it: MountIt, folder_of: Callable[[str], Path]
    ) -> None:
        made = mount_it(folder_of("stopped"), "/stopped")
        os.kill(made["process"]["pid"], signal.SIGSTOP)
        # Nothing in Linux wakes a process that waits for such an answer, so that it is left in the background.
        waits = "(ls /stopped; echo $? >/tmp/answer) >/dev/null 2>&1 &"
        assert guest.run(f"{waits} sleep 1; test ! -e /tmp/answer && echo others go on").stdout == b"others go on\n"
        began = time.monotonic()
        assert importlib.import_module(self.provider).wnodes_mount_detach(attachment=made)
        assert time.monotonic() - began < _SOON_S
        done = guest.run("until [ -e /tmp/answer ]; do sleep 0.05; done; cat /tmp/answer; ls /stopped")
        assert done.stdout == b"2\n" and done.code == 2, "once its gateway is gone the mount answers with an error"


def _soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SOON_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
