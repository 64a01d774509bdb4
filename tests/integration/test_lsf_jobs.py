"""What users do with bsub, in real guests: commands and scripts, arrays, terminals, signals, limits, requeues.

A booted kernel has an id of its own (/proc/sys/kernel/random/boot_id), so the id says which VM a
command ran in; the host's says that it ran bare. Each job does much, because its VM takes seconds.
"""

from __future__ import annotations

import json
import os
import pty
import pwd
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wnodes_lsf.testing import SHARED, Site, until

from wnodes_core.model import Image

pytestmark = [pytest.mark.lsf, pytest.mark.guest]
ID = "/proc/sys/kernel/random/boot_id"
HOST = Path(ID).read_text().strip()


@pytest.fixture(scope="module")
def site(minimal_image: Image) -> Iterator[Site]:
    with Site(minimal_image, build=SHARED, queue={"REQUEUE_EXIT_VALUES": "122 77"}) as site:
        yield site


@pytest.fixture(autouse=True)
def clean_again(site: Site) -> Iterator[None]:
    yield
    site.assert_nothing_left()


def lines(site: Site, job: str) -> list[str]:
    """What a job printed, without our own words."""
    return [line for line in site.output(job).splitlines() if not line.startswith("wnodes: booting")]


COMMAND = """\
cat /proc/sys/kernel/random/boot_id | tr a-f A-F; echo "two  words" 'single $HOME' \\; $((1+1)) `echo tick` > out; cat out
printf '%s|' "a'b" 'c"d'; echo end && false || exit 9"""


def test_a_command_with_every_sign_of_the_shell_runs_as_typed_and_nothing_of_it_on_the_host(site):
    quoted = site.bsub([COMMAND])
    plain = site.bsub(['cat /proc/sys/kernel/random/boot_id; echo "$LSB_JOBID $LSB_JOBINDEX" > plain; exit 3 | cat'])
    assert site.ended(quoted)["exit_code"] == "9", site.about(quoted)
    boot, *rest = lines(site, quoted)
    assert boot.lower() != HOST and rest == ["two  words single $HOME ; 2 tick", "a'b|c\"d|end"], site.about(quoted)
    assert site.ended(plain)["exit_code"] == "0"
    assert lines(site, plain)[0] not in (HOST, boot.lower())
    assert (site.work / "plain").read_text() == f"{plain} 0\n"
    assert (site.work / "plain").owner() == site.user


PYTHON = """\
#!/usr/bin/env python3
#BSUB -a wnodes(image=debian12,cpus=1)
import os, sys
print(open("/proc/sys/kernel/random/boot_id").read().strip(), sys.stdin.read() == "", os.environ["MINE"], os.environ["LSB_JOBID"], flush=True)
print("WNODES_REQUEST" in os.environ, "it's", file=sys.stderr, flush=True)
os.kill(os.getpid(), 10)
"""


def test_a_script_for_any_interpreter_keeps_environment_streams_and_its_end_by_signal(site):
    hostile = {"MINE": "é€", "LSB_JOBID": "1", "LSB_JOBINDEX": "7", "LSB_QUEUE": "normal", "BASH_ENV": "/bin/false"}
    hostile |= {"LD_PRELOAD": "/nonexistent/evil.so", "PYTHONPATH": "/nonexistent", "PYTHONSTARTUP": "/bin/false", "ENV": "/x"}
    done = site.run_as(["bsub", "-o", "py", "-e", "err"], stdin=PYTHON.encode(), environ=hostile, check=False)
    job = re.search(r"<(\d+)>", done.text)[1]
    bare = site.submit(f"cat {ID}", image="", environ={"LD_PRELOAD": "", "BASH_ENV": ""})
    shown = site.ended(job)
    boot, no_stdin, mine, said = (site.work / "py").read_text().split()
    assert boot != HOST and (no_stdin, mine, said) == ("True", "é€", job)
    assert "False it's\n" in (site.work / "err").read_text()
    assert shown["exit_code"] == "138"  # died by SIGUSR1
    assert site.ended(bare)["exit_code"] == "0" and site.output(bare).strip() == HOST


def test_each_element_of_an_array_has_a_vm_of_its_own(site):
    job = site.submit(f"cat {ID}; echo $LSB_JOBINDEX; exit $LSB_JOBINDEX", "-J", "many[1-2]")
    ends = [site.ended(f"{job}[{index}]")["exit_code"] for index in (1, 2)]
    seen = [lines(site, f"{job}[{index}]") for index in (1, 2)]
    assert ends == ["1", "2"] and [text[1] for text in seen] == ["1", "2"], seen
    assert len({HOST, *(text[0] for text in seen)}) == 3


WORDS = ("int", "term", "usr2")  # bash has its own to say of the sleep that the signal ended too
TRAPS = """\
trap 'echo int' INT; trap 'echo term; exit 5' TERM; trap 'echo usr2; touch usr2' USR2
touch ready; n=0; while [ $n -lt 600 ]; do sleep 0.1; n=$((n+1)); done"""


def test_bkill_reaches_the_job_s_traps_and_its_last_word_even_the_deaf(site):
    polite = site.submit(TRAPS)
    deaf = site.submit("trap '' INT TERM; touch deaf; sleep 300 & wait; while :; do sleep 1; done")
    until(lambda: (site.work / "ready").exists() and (site.work / "deaf").exists(), lambda: site.about(deaf), 90)
    site.run_as(["bkill", polite])
    site.run_as(["bkill", "-s", "KILL", deaf])
    assert site.ended(polite)["exit_code"] == "5"
    assert [line for line in lines(site, polite) if line in WORDS] == ["int", "term"]
    assert site.ended(deaf)["exit_code"] == "137"  # INT, TERM, then KILL


def test_a_job_killed_while_it_boots_never_begins(site):
    job = site.submit("touch never", image="debian12,start=cold")
    until(lambda: site.lease(job).get("keeper_state") == "starting", lambda: site.about(job), 30)
    site.run_as(["bkill", job])
    assert site.ended(job)["exit_code"] in ("130", "143", "137")
    waiting = site.submit("touch never", "-H")
    site.run_as(["bkill", waiting])
    assert site.ended(waiting)["stat"] == "EXIT"
    assert not (site.work / "never").exists()


def test_the_run_limit_warns_and_ends_a_job_and_a_requeued_one_gets_a_fresh_vm(site):
    (site.work / "usr2").unlink(missing_ok=True)
    (site.work / "ready").unlink(missing_ok=True)
    limited = site.submit(TRAPS, "-W", "15")  # of the simulator's minutes of one second
    script = f"cat {ID}; [ -e /tmp/mark ] && echo old; touch /tmp/mark; [ -e again ] && exit 0; touch again; exit 77"
    job = site.submit(script)
    shown = site.ended(job)
    first, second = lines(site, job)
    assert shown["stat"] == "DONE" and len({first, second, HOST}) == 3, site.about(job)
    assert site.ended(limited)["exit_code"] == "5", site.about(limited)
    assert [line for line in lines(site, limited) if line in WORDS] == ["usr2", "int", "term"]


def test_a_stopped_job_s_vm_stands_still_until_it_is_resumed(site):
    job = site.submit("n=0; while [ ! -e go ]; do n=$((n+1)); echo $n > count; sleep 0.1; done; cat count")
    count = site.work / "count"

    def counted() -> int:
        return int(count.read_text().strip() or 0) if count.exists() else 0

    until(lambda: counted() > 3, lambda: site.about(job), 90)
    site.run_as(["bstop", job])
    until(lambda: (site.show(job)["stat"], counted(), time.sleep(0.7)) == ("USUSP", counted(), None), "standstill", 20)
    stood = counted()
    site.run_as(["bresume", job])
    until(lambda: counted() > stood, lambda: site.about(job), 20)
    # A queue without our JOB_CONTROLS sends SIGSTOP, which no launcher can catch.
    group = json.loads((site.lab.share / "sbatchd.state").read_text())[job]["pid"]
    os.killpg(group, signal.SIGSTOP)
    until(lambda: (counted(), time.sleep(1.2)) == (counted(), None), "standstill", 20)
    stood = counted()
    os.killpg(group, signal.SIGCONT)
    until(lambda: counted() > stood, lambda: site.about(job), 20)
    (site.work / "go").touch()
    assert site.ended(job)["stat"] == "DONE"


def test_bsub_interactive_has_stdin_both_outputs_and_the_exit_code(site):
    argv = ["bsub", "-I", "-a", "wnodes(debian12)", f"cat; cat {ID}; echo oops >&2; tty; exit 4"]
    done = site.run_as(argv, stdin=b"typed\n\0binary\xff", check=False)
    assert done.exit_code == 4, done
    out = done.stdout.split(b"is submitted to queue <vm>.\n")[1]
    boot, tty = out.removeprefix(b"typed\n\0binary\xff").decode().splitlines()
    assert len(boot) == len(HOST) and boot != HOST and tty == "not a tty"
    assert b"oops" in done.stderr


def test_bsub_with_a_terminal_is_a_terminal_in_the_guest(site):
    text, code = at_terminal(site, ["bsub", "-Is", "-a", "wnodes(debian12)", "bash --norc"], [f"cat {ID}; stty size", "exit 6"])
    assert code == 6, text
    boot, size = re.search(r"([0-9a-f-]{36})\s+(\d+ \d+)", text).groups()
    assert boot != HOST and size == "33 101"


def at_terminal(site: Site, argv: list[str], typed: list[str]) -> tuple[str, int]:
    """Type lines at a command's prompt ``$ ``, on a terminal of 33 x 101; its output and exit code."""
    import fcntl
    import struct
    import termios

    person = pwd.getpwnam(site.user)
    environ = {**site.lab.environ, "SHELL": "/bin/bash", "HOME": person.pw_dir, "PS1": "$ ", "TERM": "dumb"}
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.initgroups(site.user, person.pw_gid)
            os.setgid(person.pw_gid)
            os.setuid(person.pw_uid)
            os.chdir(site.work)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
            os.execvpe(argv[0], argv, environ)
        finally:
            os._exit(127)
    text, deadline = _converse(fd, list(typed)), time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.05)
    os.close(fd)
    return text, os.waitstatus_to_exitcode(ended[1])


def _converse(fd: int, typed: list[str]) -> str:
    text, seen, deadline = b"", 0, time.monotonic() + 90
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                data = os.read(fd, 65536)
            except OSError:  # EIO: the other side has gone
                break
            text += data
        if typed and re.search(rb"\$ \Z", text[seen:]):
            seen = len(text)
            os.write(fd, typed.pop(0).encode() + b"\r")
    return text.decode(errors="replace").replace("\r", "")
