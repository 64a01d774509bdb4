"""A second account in a pilot's VM: its own gateway, its own mounts, its own uid on the host. All of it real."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wnodes_lsf.testing import Site, make_user, until

from wnodes_core import processes
from wnodes_core.model import Image, Process

pytestmark = [pytest.mark.lsf, pytest.mark.guest]
PILOT, ALICE, BOB = "wnodes-t1", "wnodes-t2", "wnodes-t3"
POLICY = """\
policy:
  - users: [{PILOT}]
    may_become: [{ALICE}]
  - users: [{ALICE}]
    mounts: ["{top}/alice:~", "{top}/shared:/shared:ro"]
"""


def gateways(account: str) -> list[Process]:
    uid = pwd.getpwnam(account).pw_uid
    return [p for p in processes.table() if p.uid == uid and p.command and p.command[0].endswith("sftp-server")]


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="wnodes-as-", dir="/var/tmp"))
    folder.chmod(0o755)
    for name, owner in (("alice", ALICE), ("shared", "root")):
        (folder / name).mkdir()
        shutil.chown(folder / name, make_user(owner) if owner != "root" else owner)
    (folder / "alice").chmod(0o700)
    (folder / "shared/word").write_text("shared\n")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def site(minimal_image: Image, top: Path) -> Iterator[Site]:
    make_user(BOB)
    with Site(minimal_image, settings=POLICY.format(PILOT=PILOT, ALICE=ALICE, top=top)) as made:
        yield made


SCRIPT = r"""
exec 2>&1
echo mine > pilots; chmod 600 pilots
as="wnodes-run-as {ALICE} --"
echo "1 $($as sh -c 'id -un; id -u; pwd; echo $HOME; echo x > $HOME/file; cat /shared/word' | tr '\n' ' ')"
$as sh -c 'echo secret > $HOME/secret; chmod 600 $HOME/secret; umask; exit 7'; echo "2 $?"
echo "3 $(cat {top}/alice/secret 2>&1; ls -A ~{ALICE} 2>&1)"
echo "4 $($as cat {work}/pilots 2>&1)"
echo "5 $($as sh -c 'cat /proc/{pid}/environ' 2>&1)"
echo "6 $(echo in | $as sh -c 'read w; echo got $w')"
wnodes-run-as {BOB} id; echo "7 $?"
wnodes-run-as root id; echo "8 $?"
$as sh -c 'touch /shared/x'; echo "9 $?"
$as sh -c 'kill -9 $$'; echo "10 $?"
$as nosuch; echo "11 $?"
wnodes-run-as; echo "12 $?"
echo "13 $($as sh -c 'PATH=/usr/lib/wnodes/bin:$PATH; wnodes-run-as {ALICE} id' 2>&1)"
$as sh -c 'trap "echo term > ~/ended; exit" TERM; echo up; sleep 60 & wait' > up & while ! grep -q up up; do sleep 0.1; done; kill $!
while ! $as test -s ended; do sleep 0.2; done; echo "14 done"
"""


def test_a_pilot_acts_as_the_sanctioned_account_and_each_keeps_its_own(site: Site, top: Path) -> None:
    script = SCRIPT
    for name, value in {"ALICE": ALICE, "BOB": BOB, "top": top, "work": site.work, "pid": "1"}.items():
        script = script.replace("{" + name + "}", str(value))
    job = site.submit(script + "\necho held; while [ ! -e go ]; do sleep 0.2; done\n")
    until(lambda: "held" in site.output(job) or site.show(job)["stat"] == "EXIT", lambda: site.about(job), 90)
    print(site.output(job))
    (site.work / "go").touch()
    site.ended(job)
    print(site.log()[-3000:])
    assert 0
