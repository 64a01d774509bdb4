"""A second account in a pilot's VM: its own gateways, mounts and uid on the host; the attacks are those of guest root.

One job of a real wnodesd's is held for all tests; the last one ends it, after a wnodesd that was killed.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    mounts: ["{top}"]
  - users: [{ALICE}]
    mounts: ["{top}/alice:~", "{top}/shared:/shared:ro"]
"""
# As any launcher's client; root may say that a command is to be guest root's.
CLIENT = """
import json, sys
from wnodes_core.guest import client
given = json.loads(sys.argv[1])
end = client.run(given.pop("path"), client.Command(**given))
print(end.error, file=sys.stderr, end="")
sys.exit(128 + end.signal if end.signal else end.code)
"""


class Pilot:
    """The held job and its VM. ``run`` is a script of the pilot's, or of guest root's."""

    def __init__(self, site: Site, top: Path) -> None:
        self.site, self.top, self.work = site, top, site.work
        self.user, self.alice = pwd.getpwnam(PILOT), pwd.getpwnam(ALICE)
        self.job = site.submit("while [ ! -e go ]; do sleep 0.2; done")
        self.lease = site.wait_running(self.job)

    def run(self, script: str, *, root: bool = False, stdin: str = "", cwd: str = "/", code: int | None = 0) -> str:
        who = {"uid": -1, "gid": -1} if root else {"uid": self.user.pw_uid, "gid": self.user.pw_gid, "groups": [self.user.pw_gid]}
        environ = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "X509_USER_PROXY": "the pilot's"}
        asked = {"path": f"{self.lease['folder']}/keeper.sock", "argv": ["sh", "-c", script], "cwd": cwd, "environ": environ, **who}
        done = subprocess.run([sys.executable, "-c", CLIENT, json.dumps(asked)], input=stdin.encode(), capture_output=True, timeout=60)
        out = (done.stdout + done.stderr).decode(errors="replace")
        assert code in (None, done.returncode), (done.returncode, out)
        return out

    def as_alice(self, script: str, **how: Any) -> str:
        return self.run(f"exec wnodes-run-as {ALICE} -- sh -c '{script}'", **how)

    def gateways(self) -> list[Process]:
        return gateways(ALICE)


def gateways(account: str) -> list[Process]:
    uid = pwd.getpwnam(account).pw_uid
    return [p for p in processes.table() if p.uid == uid and p.command[0].endswith("/sftp-server")]


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="wnodes-as-", dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "open").write_text("anybody's on the host, but not in her mounts\n")
    for name in ("alice", "shared"):
        (folder / name).mkdir()
    shutil.chown(folder / "alice", make_user(ALICE))
    (folder / "alice").chmod(0o700)
    (folder / "any").mkdir()
    (folder / "any").chmod(0o1777)
    (folder / "shared/word").write_text("shared\n")
    (folder / "alice/roots").write_text("of root's\n")
    (folder / "alice/roots").chmod(0o600)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pilot(minimal_image: Image, top: Path) -> Iterator[Pilot]:
    make_user(BOB)
    with Site(minimal_image, settings=POLICY.format(PILOT=PILOT, ALICE=ALICE, top=top)) as site:
        yield Pilot(site, top)


def test_the_command_is_the_account_s_in_the_guest_and_on_the_host(pilot: Pilot) -> None:
    said = pilot.as_alice("id -un; id -u; id -G; pwd; umask; env; echo x > $HOME/file; read w; echo got $w; cat /shared/word",
                          stdin="in\n", cwd=str(pilot.work)).splitlines()  # fmt: skip
    alice = pilot.alice
    assert said[:5] == [ALICE, str(alice.pw_uid), str(alice.pw_gid), alice.pw_dir, "0022"], "not the pilot's folder either"
    assert {f"HOME={alice.pw_dir}", f"USER={ALICE}", f"LOGNAME={ALICE}", "LANG=C.UTF-8"} <= set(said) and "X509_USER_PROXY" not in str(said)
    assert said[-2:] == ["got in", "shared"]
    found = (pilot.top / "alice/file").stat()
    assert (found.st_uid, found.st_gid) == (alice.pw_uid, alice.pw_gid)
    servers = pilot.gateways()
    assert len(servers) == 2
    for each in servers:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{each.pid}/status").read_text().splitlines() if ":\t" in line)
        assert set(status["Uid"].split()) == {str(alice.pw_uid)} and set(status["Groups"].split()) == {str(alice.pw_gid)}
        assert status["NoNewPrivs"] == "1" and not int(status["CapEff"], 16)
        assert {os.path.basename(fd.readlink()).partition(":")[0] for fd in Path(f"/proc/{each.pid}/fd").iterdir()} == {"socket", "null"}
    pilot.as_alice("true")
    assert pilot.gateways() == servers, "the second use is served by the same"
    assert pilot.site.lease(pilot.job)["accounts"] == {ALICE: alice.pw_uid}


def test_it_ends_as_it_ended(pilot: Pilot) -> None:
    scripts = {"exit 7": 7, "kill -9 $$": 128 + 9, "exec nosuch": 127, "echo x >/shared/x": 2}
    ran = "\n".join(f"wnodes-run-as {ALICE} sh -c '{script}' 2>&1; echo : $?" for script in scripts)
    codes = [line[2:] for line in pilot.run(ran).splitlines() if line.startswith(": ")]
    assert codes == [str(code) for code in scripts.values()]


def test_whoever_is_killed_takes_the_command_along_first_kindly(pilot: Pilot) -> None:
    script = f"""wnodes-run-as {ALICE} sh -c 'trap "echo term >~/ended; exit" TERM; echo up; sleep 60 & wait' >/tmp/up &
    until grep -q up /tmp/up; do sleep 0.1; done; kill $!"""
    pilot.run(script)
    until(lambda: (pilot.top / "alice/ended").exists(), "its last words")


def test_who_is_not_sanctioned_is_named_and_refused(pilot: Pilot) -> None:
    names = [BOB, "root", "1002", "../x", f"{ALICE}\nroot", "daemon", "@wheel", "nosuch-account"]
    said = pilot.run("\n".join(f"wnodes-run-as '{name}' id 2>&1; echo : $?" for name in names))
    assert [line for line in said.splitlines() if line.startswith(": ")] == [": 126"] * len(names)
    assert "uid=" not in said and f"may_become: [{BOB}]" in said
    assert all(f"account '{name.splitlines()[0]}" in said for name in names)
    assert not gateways(BOB)


def test_neither_reaches_what_is_the_other_s(pilot: Pilot) -> None:
    (pilot.work / "proxy").write_text("pilot's")
    shutil.chown(pilot.work / "proxy", PILOT)
    (pilot.work / "proxy").chmod(0o644)  # modes are no help: it is the pilot's gateway which would be asked
    script = f"""wnodes-run-as {ALICE} sh -c 'echo hers >~/secret; chmod 600 ~/secret; echo; sleep 60' >/tmp/at &
    until [ -s /tmp/at ]; do sleep 0.1; done; cat {pilot.top}/alice/secret ~{ALICE}/secret; ls /run/wnodes/mounts
    for p in $(ps -o pid= -u {ALICE}); do echo at $p; ls /proc/$p/root/shared; done; kill $!"""
    said = pilot.run(script)
    assert (pilot.top / "alice/secret").read_text() == "hers\n"
    assert "hers" not in said and "word" not in said and "at " in said and said.count("ermission denied") >= 4
    reach = f"cat {pilot.work}/proxy {pilot.top}/open; ls -A {pilot.top}; cat /proc/1/environ"
    said = pilot.as_alice(f"{reach}; grep fuse /proc/self/mountinfo", code=None)
    assert "pilot's" not in said and "anybody's" not in said
    mounted = [line.split()[4] for line in said.splitlines() if "fuse.sshfs" in line]
    assert {each for each in mounted if not each.startswith("/run/wnodes/")} == {pilot.alice.pw_dir, "/shared"}
    assert pilot.run(f"cat {pilot.work}/proxy") == "pilot's"


def test_the_host_s_commands_are_not_for_the_account(pilot: Pilot) -> None:
    said = pilot.as_alice(f"PATH=$PATH:/usr/lib/wnodes/bin; wnodes-run-as {ALICE} id; bjobs", code=None)
    assert "serves only the user of the job" in said and "uid=" not in said and "JOBID" not in said


def test_guest_root_is_the_account_there_and_no_more(pilot: Pilot) -> None:
    theirs = "/run/wnodes/mounts/as.org.wnodes.mount.2"  # after the pilot's two
    assert "Permission denied" in pilot.run(f"cat {theirs}/roots", root=True, code=1)
    made = "cp /bin/true suid; chown 0:0 suid; chmod 6755 suid; mknod disk b 8 0; mkfifo fifo; touch f; chown 1:1 f"
    pilot.run(f"cd {theirs}; mkdir evil; cd evil; {made}; true", root=True)
    for path in (pilot.top / "alice/evil").iterdir():
        assert path.stat().st_uid == pilot.alice.pw_uid and not stat.S_ISBLK(path.stat().st_mode), path
    shared = "/run/wnodes/mounts/as.org.wnodes.mount.3"
    pilot.run(f"mount -o remount,rw,bind {shared}; echo x >{shared}/x", root=True, code=2)
    folder = pilot.top / "alice/turn"
    folder.mkdir()
    (folder / "open").write_text("harmless")
    shutil.chown(folder, ALICE)
    assert pilot.run(f"cat {theirs}/turn/open", root=True) == "harmless"
    folder.rename(pilot.top / "alice/turned")
    folder.symlink_to(pilot.top)  # a link out, that the server itself would follow
    said = pilot.run(f"cat {theirs}/turn/open {theirs}/turn/shared/word; echo x >{theirs}/turn/any/new", root=True, code=2)
    assert "anybody's" not in said and "shared\n" not in said and not (pilot.top / "any/new").exists()
    folder.unlink()


def test_a_gateway_that_is_killed_is_replaced_for_the_next_command(pilot: Pilot) -> None:
    """Whoever runs meanwhile is told that its mount has gone, and keeps the others; the pilot notices nothing."""
    script = "echo >~/up; until [ -e /shared/go ]; do sleep 0.2; done; echo y >~/late; cat /shared/word"
    with ThreadPoolExecutor(1) as aside:
        running = aside.submit(pilot.as_alice, script)
        until(lambda: (pilot.top / "alice/up").exists(), "a command that runs")
        home, shared = sorted(pilot.gateways(), key=lambda each: str(pilot.top / "alice") not in each.command)
        processes.kill(home)
        assert pilot.as_alice("echo on >~/on; cat /shared/word; ls ~/up") == f"shared\n{pilot.alice.pw_dir}/up\n"
        (pilot.top / "shared/go").touch()
        said = running.result(60)
    assert "not connected" in said and "shared" in said and not (pilot.top / "alice/late").exists()
    assert (pilot.top / "alice/on").owner() == ALICE
    assert shared in pilot.gateways() and home not in pilot.gateways() and len(pilot.gateways()) == 2
    for each in pilot.gateways():
        processes.kill(each)
    assert pilot.as_alice("cat ~/on /shared/word") == "on\nshared\n"
    assert pilot.run(f"echo on >{pilot.work}/on && cat {pilot.work}/on") == "on\n"


def test_nothing_is_left_at_the_end_even_of_a_wnodesd_that_was_killed(pilot: Pilot) -> None:
    left = pilot.gateways()
    assert left
    pilot.site.stop_wnodesd(signal.SIGKILL)
    assert [p for p in left if processes.alive(p)] == left, "they serve on"
    pilot.site.start_wnodesd()
    assert pilot.site.lease(pilot.job)["accounts"] == {ALICE: pilot.alice.pw_uid}
    processes.kill(left.pop())  # its parent's end was no end of its own, and it is replaced by a wnodesd that is not its parent
    assert pilot.as_alice("cat ~/on /shared/word") == "on\nshared\n"
    assert {each.pid for each in left} < {each.pid for each in pilot.gateways()}
    (pilot.work / "go").touch()
    pilot.site.ended(pilot.job)
    pilot.site.assert_nothing_left()
    assert not pilot.gateways()
    assert str(pilot.top) not in Path("/proc/self/mountinfo").read_text()
    assert '"event": "become"' in pilot.site.log() and f'"account": "{ALICE}"' in pilot.site.log()
