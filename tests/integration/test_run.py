"""``wnodes run`` as an ordinary user types it: real guests, real libvirt, no daemon, no root."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from wnodes_core import processes

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from guests import LOCK  # noqa: E402
from lease_stage import WNODES, stage_fixture, until  # noqa: E402, F401 - fixtures

HERE = Path(__file__).parent
pytestmark = pytest.mark.guest
ODD = "it's \"odd\"\n$HOME; ünï–☃ \\x"  # spaces, quotes, a newline, UTF-8, a backslash
GROUP = 100  # users, a further group


@pytest.fixture(scope="module", autouse=True)
def store(stage, minimal_image):
    """The small guest in the user's own store, and two that do not start."""
    stage.leases = Path(f"/var/tmp/wnodes-{stage.user.pw_uid}")
    stage.groups = (GROUP,)
    boot = minimal_image.boot
    kernel = ["--kernel", boot.kernel, "--initrd", boot.initrd]
    stage.run(WNODES, "image", "add", "-q", *kernel, "--cmdline", boot.cmdline, "debian12", minimal_image.path)
    zeros = stage.home / "zeros.raw"
    zeros.write_bytes(bytes(1 << 20))
    stage.run(WNODES, "image", "add", "-q", "--format", "raw", "empty", zeros)
    stage.run(
        WNODES, "image", "add", "-q", "--format", "raw", "--kernel", boot.kernel,
        "--cmdline", "root=/dev/absent console=ttyS0 panic=-1 quiet", "panics", zeros,
    )  # fmt: skip
    # Two emulated guests on two cores starve each other.
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def a_vm(stage, *options, cwd=None):
    """A VM that runs until the block ends: its lease's folder."""
    before = set(stage.lease_folders())
    script = "echo up; read code; exit $code"
    argv = [WNODES, "run", "-q", "--image", "debian12", *options, "--", "sh", "-c", script]
    with stage.start(*argv, cwd=cwd, stdin=subprocess.PIPE) as launcher:
        said = launcher.stdout.readline()
        if said != b"up\n":
            pytest.fail(f"no VM: {launcher.communicate(timeout=10)}")
        (folder,) = set(stage.lease_folders()) - before
        launcher.folder = folder
        yield launcher
        if launcher.poll() is None:
            launcher.communicate(b"7\n", timeout=30)
            assert launcher.returncode == 7


@pytest.fixture(scope="module")
def shared(stage):
    """One VM for the tests that only look at how a command runs."""
    folder = stage.work / ODD
    folder.mkdir()
    os.chown(folder, stage.user.pw_uid, stage.user.pw_gid)
    small = stage.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=2m,uid={stage.user.pw_uid}", "none", small], check=True)
    try:
        with a_vm(stage, "--mount", f"{small}:/mnt/small", cwd=folder) as launcher:
            launcher.work = folder
            yield launcher
        assert stage.left() == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.fixture
def inside(stage, shared):
    """Run a command in the shared VM, as a job's further step does."""

    def run(*command, **more):
        argv = [sys.executable, "-I", HERE / "join_main.py", shared.folder, *command]
        return stage.run(*argv, **{"cwd": shared.work, **more})

    return run


@pytest.fixture
def start_inside(stage, shared):
    """Start a command in the shared VM."""

    def start(*command, **more):
        argv = [sys.executable, "-I", HERE / "join_main.py", shared.folder, *command]
        return stage.start(*argv, **{"cwd": shared.work, **more})

    return start


def test_the_kernel_is_the_guests(inside):
    assert inside("uname", "-r").stdout.decode().strip() != os.uname().release
    assert inside("cat", "/proc/1/comm").stdout != Path("/proc/1/comm").read_bytes()


def test_the_user_is_the_hosts(stage, inside):
    here = stage.run("sh", "-c", "id -u; id -g; id -G; id -un; umask; pwd")
    there = inside("sh", "-c", "id -u; id -g; id -G; id -un; umask; pwd", cwd=stage.work / ODD)
    assert str(GROUP) in here.stdout.decode().split("\n")[2].split()
    assert there.stdout.decode().splitlines()[:5] == here.stdout.decode().splitlines()[:5]
    assert there.stdout.decode().split("\n", 5)[5] == f"{stage.work}/{ODD}\n"


def test_files_both_ways_with_owner_and_mode(stage, shared, inside):
    here = shared.work / "given"
    here.write_text("from the host")
    here.chmod(0o640)
    os.chown(here, stage.user.pw_uid, stage.user.pw_gid)
    script = (
        "stat -c '%u %g %a' given; cat given; umask 027; printf new > made; mkdir sub; chmod 751 sub;"
        "ln -s made link; printf more >> given; mv given moved"
    )
    done = inside("sh", "-c", script)
    assert done.stdout.decode() == f"{stage.user.pw_uid} {stage.user.pw_gid} 640\nfrom the host"
    made = (shared.work / "made").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (stage.user.pw_uid, stage.user.pw_gid, 0o640)
    assert (shared.work / "sub").stat().st_mode & 0o777 == 0o751
    assert os.readlink(shared.work / "link") == "made"
    assert (shared.work / "moved").read_text() == "from the hostmore"


@pytest.mark.parametrize("code", [0, 1, 125, 255])
def test_exit_code(inside, code):
    assert inside("sh", "-c", f"exit {code}", check=False).returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_an_end_by_signal_is_ours(inside, number):
    assert inside("sh", "-c", f"kill -{number} $$", check=False).returncode == -number


def test_a_missing_program_is_127_and_named(inside):
    done = inside("no-such-program", check=False)
    assert done.returncode == 127
    assert b"no-such-program: No such file or directory" in done.stderr


def test_twenty_megabytes_both_ways_and_stderr_apart(inside):
    data = os.urandom(20 << 20)
    done = inside("sh", "-c", "tee /dev/stderr | md5sum >&2; exec 2>&-; echo out", stdin=b"x", check=False)
    assert done.stdout == b"out\n"
    done = inside("tee", "/dev/null", stdin=data)
    assert hashlib.md5(done.stdout).digest() == hashlib.md5(data).digest()
    done = inside("sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_arguments_arrive_as_they_are(inside):
    words = [ODD, "", "a" * 4096, "*", "$(id)", "-n", "\udcff"]
    done = inside("printf", "%s\\0", *words)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words)


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1", "HUP"])
def test_signals_reach_the_commands_own_trap(start_inside, name):
    script = f"trap 'echo got {name}; exit 3' {name}; echo up; while :; do sleep 0.1; done"
    with start_inside("bash", "-c", script) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        out, err = process.communicate(timeout=15)
    # The whole process group gets it, as from a terminal; bash may mention its sleep's end.
    assert (process.returncode, out) == (3, f"got {name}\n".encode()), err


def test_a_full_disk_is_the_commands_own_error(inside):
    done = inside("sh", "-c", "head -c 4m /dev/zero > /mnt/small/big; echo $?; rm -f /mnt/small/big", check=False)
    # SFTP 3 has no code for a full disk (draft-ietf-secsh-filexfer-02, section 7): sshfs makes it EIO.
    assert b"Input/output error" in done.stderr or b"No space left on device" in done.stderr
    assert done.stdout == b"1\n"
    assert inside("sh", "-c", "echo on > /mnt/small/again && cat /mnt/small/again").stdout == b"on\n"


def test_a_killed_launcher_hangs_its_command_up_and_spares_the_vm(start_inside, inside):
    with start_inside("sh", "-c", "echo $$; exec sleep 300") as process:
        pid = process.stdout.readline().decode().strip()
        process.kill()
    until(lambda: inside("test", "-e", f"/proc/{pid}", check=False).returncode == 1, "the command is hung up")


# each of these is a ``wnodes run`` of its own


def run(stage, *words, **more):
    return stage.run(WNODES, "run", *words, **{"check": False, **more})


@pytest.fixture
def nothing_new(stage):
    """What a test's own leases left, beside the shared one's."""
    before = set(stage.left())
    yield
    deadline = time.monotonic() + 5
    while (new := set(stage.left()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not new, "\n".join(sorted(new))


leaves_nothing = pytest.mark.usefixtures("nothing_new")


@leaves_nothing
@pytest.mark.parametrize(
    ("words", "code", "wanted"),
    [
        (["--image", "debain12"], 125, ["debain12", "debian12"]),
        (["--image", "no/such"], 125, ["'no/such'", "want NAME"]),
        (["--vm", "image=debian12,memroy=2G"], 125, ["memroy=2G", "did you mean memory=?"]),
        (["--image", "debian12", "--memory", "lots"], 125, ["memory 'lots'", "as in 8G"]),
        (["--image", "debian12", "--memory", "64M"], 125, ["memory 64 MiB", "at least 128 MiB"]),
        (["--image", "debian12", "--mount", "/tmp:rel"], 125, ["target must be an absolute path", "'rel'"]),
        (["--image", "debian12", "--mount", "/tmp:/usr/x"], 125, ["/usr/x", "belongs to the guest's own system"]),
        (["--image", "debian12", "--mount", "/no/such/folder"], 125, ["/no/such/folder", "No such file or directory"]),
        (["--image", "debian12", "--accel", "kvm"], 125, ["KVM"]),
        (["--image", "debian12", "-t"], 2, ["-t needs a terminal"]),
        ([], 125, ["no image asked for", "image=NAME"]),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_a_request_that_cannot_be_had_is_refused_with_value_and_wish(stage, words, code, wanted):
    if "kvm" in words and os.access("/dev/kvm", os.R_OK | os.W_OK):
        wanted = []  # a host with KVM may well run it
    done = run(stage, *words, "--", "echo", "ran")
    said = done.stderr.decode()
    if wanted:
        assert (done.returncode, done.stdout) == (code, b""), said
    assert all(word in said for word in wanted), said
    assert "Traceback" not in said


@leaves_nothing
def test_a_run_as_a_stranger_sees_it(stage):
    data = os.urandom(20 << 20)
    script = "uname -r >&2; hostname >&2; cat; exit 42"
    began = time.time()
    words = ("--vm", "image=debian12,trace=yes", "--start", "cold", "--trace")
    done = run(stage, *words, "--", "sh", "-c", script, stdin=data)
    said = done.stderr.decode()
    assert done.returncode == 42, said
    assert hashlib.md5(done.stdout).digest() == hashlib.md5(data).digest()
    assert os.uname().release not in said
    assert "\nwn-" in said
    assert "wnodes: booting debian12" in said
    lines = [line for line in said.splitlines() if line.startswith("wnodes: cold start in ")]
    assert re.fullmatch(r"wnodes: cold start in \d+\.\d{3} s \(launcher \d\.\d\d, .*boot .*\)", lines[0]), said
    assert said.index(lines[0]) < said.index("\nwn-") < said.index(lines[1] + "\nphase "), "one before, one after"
    phases = [line.split()[0] for line in said.partition("\nphase ")[2].splitlines()[1:]]
    assert phases[:5] == ["launcher", "image", "template", "keeper", "overlay"], said
    assert phases[-4:] == ["agent", "mount", "first", "run"], said
    ended = json.loads(stage.run(WNODES, "lease", "list", "--ended", "--json").stdout)
    ids = [lease["id"] for lease in ended if lease["state"] == "ended" and lease["since"] >= began]
    told = [json.loads(stage.run(WNODES, "lease", "trace", name, "--json").stdout) for name in ids]
    (mine,) = [each for each in told if abs(each["seconds"] - float(lines[1].split()[4])) < 0.002]
    assert mine["start"]["kind"] == "cold" and mine["trace"][-1]["name"] == "teardown", mine


@leaves_nothing
def test_a_terminal(stage):
    master, slave = os.openpty()
    resize(master, 33, 77)
    script = "tty; stty size; trap 'stty size; exit 5' WINCH; echo up; while :; do sleep 0.1; done"
    argv = ["setsid", "--ctty", WNODES, "run", "-q", "--image", "debian12", "-it", "--", "bash", "-c", script]
    process = stage.start(*argv, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    with process:
        said = read_until(master, b"up\r\n")
        assert b"/dev/pts/" in said
        assert b"33 77\r\n" in said
        resize(master, 44, 111)
        assert b"44 111\r\n" in read_until(master, b"111\r\n")
        assert process.wait(15) == 5
    os.close(master)


def resize(fd, rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_until(fd, mark):
    said = b""
    while mark not in said:
        said += os.read(fd, 65536)
    return said


@leaves_nothing
def test_a_guest_that_never_boots(stage):
    config = stage.folder / "impatient.yaml"
    config.write_text("vm: {boot_timeout_s: 4s}\n")
    done = run(stage, "-q", "--image", "empty", "--", "true", environ=stage.environ(WNODES_CONFIG=config))
    assert done.returncode == 125
    assert b"did not answer within 4 s" in done.stderr


@leaves_nothing
def test_a_guest_that_panics(stage):
    began = time.monotonic()
    done = run(stage, "-q", "--image", "panics", "--", "true")
    assert done.returncode == 125
    assert b"the VM ended while it started; its console ended with" in done.stderr
    assert b"Unable to mount root fs" in done.stderr
    assert time.monotonic() - began < 60


@leaves_nothing
def test_a_qemu_that_is_killed_under_its_command(stage):
    with a_vm(stage) as launcher:
        pid = json.loads((launcher.folder / "lease.json").read_text())["vm_pid"]
        processes.kill(processes.read(pid))
        _, err = launcher.communicate(timeout=15)
    assert launcher.returncode == 125
    assert b"wnodes: error:" in err
    assert b"VM" in err


@leaves_nothing
def test_a_killed_launcher_takes_the_vm_with_it(stage):
    with a_vm(stage) as launcher:
        launcher.kill()
        launcher.wait(5)
    # ``nothing_new`` gives it five seconds.


@leaves_nothing
def test_two_runs_at_once(stage):
    argv = [WNODES, "run", "-q", "--image", "debian12", "--", "sh", "-c", "hostname; touch $1; echo $?", "sh"]
    with stage.start(*argv, "one") as one, stage.start(*argv, "two") as two:
        said = [process.communicate(timeout=100)[0].decode().split() for process in (one, two)]
    assert [process.returncode for process in (one, two)] == [0, 0]
    assert said[0][0] != said[1][0]
    assert [words[1] for words in said] == ["0", "0"]
    assert {"one", "two"} <= {path.name for path in stage.work.iterdir()}
