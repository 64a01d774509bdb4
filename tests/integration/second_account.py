"""A pilot's script that uses a second account in its VM, and what must be true of it afterwards: under any LRMS."""

from __future__ import annotations

import pwd
import shutil
import tempfile
from pathlib import Path
from typing import Self

from wnodes_core import processes
from wnodes_core.testing.site import USER, Site, make_user, until

ALICE, BOB = "wnodes-t2", "wnodes-t3"
# Two commands of alice's, then one of an account that nobody sanctions. Her eyes are not the node's: what she must not
# see, anybody there may read.
SCRIPT = """
echo the-pilots >proxy; chmod 644 proxy
echo word | wnodes-run-as {alice} sh -c 'read w; id -un; echo got $w; echo hers >>~/made; exit 7'; echo code $?
wnodes-run-as {alice} -- sh -c 'cat "$1/proxy"; ls -A "$1"; cat ~/made {top}/shared/word; findmnt -n -o FSTYPE -T ~' sh "$PWD" 2>/dev/null
echo code $?; wnodes-run-as {bob} id 2>/dev/null; echo code $?
cat proxy; findmnt -n -o FSTYPE -T .; cat {top}/alice/made 2>/dev/null || echo not-the-pilots
"""


class Second:
    """Alice's two folders on the node; ``rules`` are a site's that give her them, and let its user become her."""

    def __init__(self) -> None:
        self.uid = pwd.getpwnam(make_user(ALICE)).pw_uid
        make_user(BOB)
        self.top = Path(tempfile.mkdtemp(prefix="wnodes-as-", dir="/var/tmp"))
        self.top.chmod(0o755)
        for name in ("alice", "shared"):
            (self.top / name).mkdir()
        (self.top / "shared/word").write_text("shared\n")
        (self.top / "alice").chmod(0o700)
        shutil.chown(self.top / "alice", ALICE)
        self.script = SCRIPT.format(alice=ALICE, bob=BOB, top=self.top)

    def rules(self, *queues: str) -> str:
        """Items of a ``policy:``; without ``queues`` in all of them."""
        only = f"\n    queues: [{', '.join(queues)}]" if queues else ""
        mounts = f'["{self.top}/alice:~", "{self.top}/shared:{self.top}/shared:ro"]'
        return f"""\
  - users: [{USER}]
    may_become: [{ALICE}]{only}
  - users: [{ALICE}]
    mounts: {mounts}
"""

    def check(self, site: Site, job: str, said: list[str], filesystem: str = "fuse.sshfs") -> None:
        """What ``script`` printed as the last of a job's lines, her file, the records; nothing of hers is left."""
        assert said[-11:] == [
            *(ALICE, "got word", "code 7"),
            *("hers", "shared", "fuse.sshfs", "code 0"),  # and not the pilot's file, nor its name
            *("code 126", "the-pilots", filesystem, "not-the-pilots"),
        ], (said, site.log()[-3000:])
        made = self.top / "alice/made"
        assert (made.read_text(), made.stat().st_uid) == ("hers\n", self.uid)
        made.unlink()
        assert site.lease(job)["accounts"] == {ALICE: self.uid}
        until(lambda: not self.left(), lambda: f"end of alice's gateways: {self.left()}")

    def left(self) -> list[str]:
        """Processes and mounts that name her folders."""
        found = [str(each) for each in processes.table() if any(str(self.top) in word for word in each.command)]
        return found + [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.top) in line]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.top)
