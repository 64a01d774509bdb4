"""A command through launcher, relay, channel and agent, all real, without a VM."""

from __future__ import annotations

import importlib.util
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("guest_kit", Path(__file__).with_name("guest_kit.py"))
assert _spec is not None and _spec.loader is not None
guest_kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guest_kit)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    kit = guest_kit.Kit(tmp_path_factory.mktemp("vm"))
    try:
        yield kit.start()
    finally:
        kit.close()


def gone(pid: int, timeout_s: float = 5) -> bool:
    """Whether a process ends in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


def first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_streams_are_apart_and_binary_and_the_code_comes_back(kit):
    data = bytes(range(256)) * 5000
    done = kit.run("sh", "-c", "cat; printf 'e\\377' >&2; exit 7", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (7, data, b"e\xff")


def test_the_command_gets_exactly_what_was_given(kit, tmp_path):
    odd = os.fsdecode(b"caf\xc3\xa9\xff'\"\n$")
    code = "import os,sys;print(os.getcwd(),oct(os.umask(0)),sorted(os.environ.items()),sys.argv[1:])"
    done = kit.run(sys.executable, "-c", code, odd, cwd=str(tmp_path), umask=0o27, environ={"A b": odd, "Z": ""})
    want = [("A b", odd), ("WNODES_EXEC", "0"), ("Z", "")]
    shown = done.stdout.decode()
    assert f"{tmp_path} 0o27" in shown and repr(want[0]) in shown and repr(want[2]) in shown and repr([odd]) in shown
    names = [name for name, _ in eval(shown[shown.index("[") : shown.index("]") + 1])]
    assert set(names) - {"LC_CTYPE"} == {"A b", "Z", "WNODES_EXEC"}  # LC_CTYPE: python3's own doing


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL, signal.SIGPIPE, signal.SIGTERM])
def test_a_death_by_signal_is_a_death_by_that_signal(kit, number):
    assert kit.run("sh", "-c", f"kill -{int(number)} $$").returncode == -number


@pytest.mark.parametrize(("argv", "code"), [(["/no/such"], 127), (["/etc"], 126)])
def test_a_command_that_cannot_start(kit, argv, code):
    assert kit.run(*argv).returncode == code


def test_a_missing_folder_is_told(kit):
    assert kit.run("true", cwd="/no/such/folder").returncode == 127


def test_a_hundred_megabytes_of_stdout(kit, tmp_path):
    with open(tmp_path / "out", "wb") as out:
        process = kit.popen("head", "-c", "100M", "/dev/zero", stdout=out)
        assert process.wait(60) == 0
    assert (tmp_path / "out").stat().st_size == 100 << 20


def test_odd_writes_between_whole_pages_lose_nothing(kit, tmp_path):
    # Pages go by splice, odd pieces by copy: the seams between them are what could go wrong.
    code = (
        "import os,random;r=random.Random(7);b=bytes(range(256))*8192;n=0\n"
        "while n < 24 << 20:\n"
        " for s in [1<<20]*2 + [r.choice((1,77,4095,4096,5000,300_001))]:\n"
        "  o=n%256; n+=os.write(1, b[o:o+s])\n"
        "os.write(2, b'%d' % n)"
    )
    with open(tmp_path / "out", "wb") as out:
        process = kit.popen(sys.executable, "-c", code, stdout=out, stderr=subprocess.PIPE)
        size = int(process.communicate(timeout=20)[1])
    data = (tmp_path / "out").read_bytes()
    assert len(data) == size and data == (bytes(range(256)) * (size // 256 + 1))[:size]


def test_a_stalled_consumer_holds_up_nobody_else(kit):
    stalled = kit.popen("head", "-c", "64M", "/dev/zero", stdout=subprocess.PIPE)
    assert stalled.stdout is not None
    stalled.stdout.read(1)
    try:
        assert kit.run("echo", "quick").stdout == b"quick\n"
        rest = stalled.stdout.read()
        assert len(rest) == (64 << 20) - 1 and stalled.wait(10) == 0
    finally:
        stalled.kill()
        stalled.wait()
        stalled.stdout.close()


def test_stdin_from_a_file_and_from_nothing(kit, tmp_path):
    (tmp_path / "in").write_bytes(b"x" * 3_000_000)
    with open(tmp_path / "in", "rb") as file:
        process = kit.popen("wc", "-c", stdin=file, stdout=subprocess.PIPE)
        assert process.communicate(timeout=20)[0].strip() == b"3000000"
    process = kit.popen("cat", stdin=subprocess.DEVNULL)
    assert process.wait(10) == 0


def test_a_reader_that_leaves_breaks_the_pipe_in_the_guest(kit):
    process = kit.popen("sh", "-c", "trap '' TERM; exec yes", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(10) == -signal.SIGPIPE


def test_closed_fds_are_closed_there_too(kit):
    code = "import os\nfor f in 0,1,2:\n try: os.fstat(f)\n except OSError: os.write(1,b'%d'%f)"
    shell = ["sh", "-c", 'exec 0<&- 2>&-; exec "$@"', "sh", *kit.argv(sys.executable, "-c", code)]
    assert subprocess.run(shell, stdout=subprocess.PIPE, timeout=20).stdout == b"02"


def test_a_stream_that_the_command_closes_is_closed_here(kit):
    process = kit.popen("sh", "-c", "exec >&-; read x", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.read() == b""
    assert process.poll() is None
    process.communicate(b"\n", timeout=10)
    assert process.returncode == 0


def test_signals_reach_the_group_or_the_leader(kit):
    child = "(trap 'echo child >&2; exit' USR1; echo up; sleep 9 & wait)"
    for leader_only, shown in (([], b"child\n"), ([int(signal.SIGUSR1)], b"")):
        wish = {"leader_only": leader_only}
        script = f"trap 'echo got; {'' if leader_only else 'wait $c;'} exit 3' USR1; {child} & c=$!; wait"
        process = kit.popen("bash", "-c", script, wish=wish, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert first_line(process) == b"up"
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out.strip(), err) == (3, b"got", shown)


def test_a_launcher_killed_outright_takes_its_command_along(kit):
    script = "set -m; trap '' HUP; sleep 1000 & echo $$ $!; wait"
    process = kit.popen("bash", "-c", script, stdout=subprocess.PIPE)
    pids = [int(word) for word in first_line(process).split()]
    process.kill()
    process.communicate()
    assert all(gone(pid) for pid in pids)


def test_what_a_command_leaves_behind_is_ended(kit):
    done = kit.run("sh", "-c", "sleep 1000 & echo $!")
    assert gone(int(done.stdout))


def test_a_terminal_with_its_size(kit):
    code = (
        "import os,signal as s;w={s.SIGWINCH};s.pthread_sigmask(s.SIG_BLOCK,w);"
        "print(os.isatty(0),os.isatty(2),os.get_terminal_size(),flush=True);"
        "s.sigwait(w);print(os.get_terminal_size())"
    )
    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(slave)
    process = kit.popen(sys.executable, "-c", code, wish={"tty": True}, stdin=slave, stdout=slave, stderr=slave)
    try:
        assert b"True True os.terminal_size(columns=100, lines=30)" in os.read(master, 1000)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 101, 0, 0))
        process.send_signal(signal.SIGWINCH)
        assert process.wait(10) == 0
        seen = os.read(master, 1000)
        assert b"columns=101, lines=31" in seen
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_files_come_along(kit, tmp_path):
    import base64

    path = tmp_path / "spool" / "job 1" / "slurm_script"
    script = base64.b64encode(b"#!/bin/sh\necho ran $1\n").decode()
    done = kit.run(str(path), "x", files=[{"path": str(path), "mode": 0o700, "content": script}])
    assert done.stdout == b"ran x\n" and path.stat().st_mode & 0o777 == 0o700


def test_resource_limits(kit):
    done = kit.run("sh", "-c", "ulimit -n; ulimit -c", rlimits={"nofile": [77, 99], "core": [0, 0]})
    assert done.stdout == b"77\n0\n"


def test_tstp_can_pause_the_vm(kit):
    process = kit.popen(
        "sh", "-c", "echo up; read x", wish={"on_tstp": "pause"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first_line(process) == b"up"
    process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 5
    while not kit.paused and time.monotonic() < deadline:
        kit.do(lambda: None)
    process.send_signal(signal.SIGCONT)
    while len(kit.paused) < 2 and time.monotonic() < deadline:
        kit.do(lambda: None)
    process.communicate(b"\n", timeout=10)
    assert kit.paused == [True, False] and process.returncode == 0


def test_run_collects_output_of_root_commands(kit):
    done = kit.call(kit.channel.run(["sh", "-c", "echo out; echo err >&2; exit 3"]))
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert kit.call(kit.channel.run(["/no/such"])).code == 127


def test_setup_makes_the_user_once(kit):
    etc = kit.root / "etc"
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nother:x:2001:2001::/:/bin/sh\n")
    user = {"name": "jo", "uid": 2001, "gid": 2001, "home": "/", "shell": "/bin/bash"}
    groups = [{"name": "jo", "gid": 2001}, {"name": "lab", "gid": 3001}]
    for _ in range(2):
        kit.call(kit.channel.request("setup", user=user, groups=groups))
    assert (etc / "passwd").read_text() == "root:x:0:0:root:/root:/bin/sh\njo:x:2001:2001::/:/bin/bash\n"
    assert (etc / "group").read_text() == "jo:x:2001:\nlab:x:3001:jo\n"


def test_only_the_first_command_ends_the_trace(tmp_path):
    kit = guest_kit.Kit(tmp_path)
    phases = []
    try:
        kit.start()
        kit.relay.on_phase = lambda name, seconds: phases.append((name, seconds)) or ""
        kit.run("sh", "-c", "echo; sleep 0.2")
        kit.run("true")
    finally:
        kit.close()
    assert [name for name, _ in phases] == ["first instruction", "run"]
    assert 0 < phases[0][1] < 0.2 <= phases[1][1] < 2


def test_a_command_that_never_began_has_no_phase(tmp_path):
    kit = guest_kit.Kit(tmp_path)
    phases = []
    try:
        kit.start()
        kit.relay.on_phase = lambda *phase: phases.append(phase) or ""
        assert kit.run("/no/such").returncode == 127
    finally:
        kit.close()
    assert phases == []


def test_the_reverse_door_runs_only_what_is_allowed(kit):
    shim = (guest_kit.GUEST / "guest_shim.py").read_text()
    kit.call(kit.channel.request("setup", shim=shim, commands=["squeue", "srun"]))
    folder = kit.root / "run/wnodes"
    environ = {"PATH": os.environ["PATH"], "WNODES_DOOR": str(folder / "host.sock"), "MARK": "7"}
    inner = "'cat; echo $MARK >&2; exit 9'"
    script = f"echo hello | squeue -c {inner}; echo code $?; srun; echo code $?"
    done = kit.run("sh", "-c", script, environ=environ, host_commands={"squeue": "/bin/sh"})
    assert done.stdout == b"hello\ncode 9\ncode 126\n"
    assert b"7\n" in done.stderr and b"the host runs no 'srun'" in done.stderr
