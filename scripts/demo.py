"""The demo: a real Slurm on loopback, wnodesd, an ordinary user's unmodified script in a VM.

Run by scripts/demo, which has set everything up. Each step prints what it does and how long it
took; whatever happens, all that was started is stopped, and what is left behind is looked for.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wnodes_slurm.lab import Lab

from wnodes_core import processes

WORK = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"))
DEMO = WORK / "demo"
BIN = Path(sys.executable).parent
RUN = DEMO / "run"
SOCKET = str(RUN / "wnodesd.sock")
USER = "wnodes-demo"
JOB = Path(__file__).resolve().parent / "demo-job.sh"
CONFIG = """\
# The demo's settings, as an admin would write /etc/wnodes/wnodes.yaml
state_dir: {demo}/state
run_dir: {demo}/run
lrms:
  slurm:
    environment:
      SLURM_CONF: {demo}/slurm/slurm.conf
policy:
  - images: [debian12]
"""
_began = time.monotonic()


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what begins, and after it how long it took."""
    began = time.monotonic()
    print(f"\n== {text}", flush=True)
    yield
    print(f"   {time.monotonic() - began:.1f} s (at {began - _began:.0f} s)", flush=True)


def wnodes(*argv: str) -> str:
    """Run the ``wnodes`` command of our environment with the demo's settings."""
    environ = {**os.environ, "WNODES_CONFIG": str(DEMO / "wnodes.yaml")}
    print(f"$ wnodes {' '.join(argv)}", flush=True)
    done = subprocess.run([str(BIN / "wnodes"), *argv], env=environ, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


def make_user(stack: ExitStack) -> pwd.struct_passwd:
    """The ordinary user; removed again if the demo made it."""
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
        stack.callback(subprocess.run, ["userdel", "--remove", USER], capture_output=True)
        return pwd.getpwnam(USER)


def image_words() -> tuple[str, list[str]]:
    """The built image's tag, and what ``wnodes image add`` needs to know of it."""
    folder = WORK / "images" / "minimal"
    facts = dict(line.strip().partition(": ")[::2] for line in (folder / "image.yaml").read_text().splitlines())
    boot = ["--kernel", f"{folder}/vmlinuz", "--initrd", f"{folder}/initrd", "--cmdline", facts["cmdline"].strip('"')]
    digest = ["--sha256", facts["digest"].removeprefix("sha256:")]
    tag = facts["tags"].strip("[]").split(",")[0].strip('"')
    return tag, [str(folder / "disk.qcow2"), *boot, *digest, "--fact", "os=debian12", "--quiet"]


def add_image() -> None:
    """Enter the image in the node's store; at once if it is there already."""
    tag, words = image_words()
    wnodes("image", "add", f"debian12:{tag}", *words)
    wnodes("image", "tag", f"debian12:{tag}", "debian12:latest")
    print(wnodes("image", "list"))


def run_embedded(user: pwd.struct_passwd) -> None:
    """``wnodes run`` as the ordinary user: no Slurm, no wnodesd, no root."""

    def as_user(*argv: str) -> None:
        home = {"HOME": user.pw_dir, "USER": USER, "PATH": f"{BIN}:/usr/bin:/bin"}
        done = subprocess.run([str(BIN / "wnodes"), *argv], env=home, cwd=user.pw_dir, user=user.pw_uid, group=user.pw_gid,
                              extra_groups=[], stdin=subprocess.DEVNULL)  # fmt: skip
        if done.returncode:
            sys.exit(f"demo: wnodes {argv[0]} ended with {done.returncode}")

    as_user("image", "add", "debian12", *image_words()[1])
    print(f"   {USER}$ wnodes run --image debian12 --trace -- uname -a", flush=True)
    as_user("run", "--image", "debian12", "--trace", "--", "uname", "-a")


def clear_user(user: pwd.struct_passwd) -> None:
    """Remove what a user's own runs keep for the next one: capability cache, probe, own store."""
    for folder in (
        f"/var/tmp/wnodes-{user.pw_uid}",
        f"/var/tmp/wnodes-backend-{user.pw_uid}",
        f"{user.pw_dir}/.cache/wnodes",
    ):
        shutil.rmtree(folder, ignore_errors=True)


def start_wnodesd(stack: ExitStack) -> None:
    """Start the daemon and wait until it listens."""
    if os.path.exists(SOCKET):
        probe = socket.socket(socket.AF_UNIX)
        with probe:
            if probe.connect_ex(SOCKET) == 0:
                sys.exit(f"demo: a wnodesd already listens at {SOCKET}: stop it first (systemctl stop wnodesd)")
    log = stack.enter_context(open(DEMO / "wnodesd.log", "w"))
    argv = [str(BIN / "wnodesd"), "--config", str(DEMO / "wnodes.yaml"), "--log-format", "text"]
    daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    stack.callback(stop, daemon)
    deadline = time.monotonic() + 30
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(SOCKET) == 0:
                return
        if daemon.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"demo: wnodesd did not start:\n{(DEMO / 'wnodesd.log').read_text()[-3000:]}")
        time.sleep(0.05)


def stop(daemon: subprocess.Popen[bytes]) -> None:
    """End wnodesd as systemd would."""
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def run_job(lab: Lab, user: pwd.struct_passwd) -> None:
    """The story: submit as the user, show what came of it."""
    folder = Path(user.pw_dir) / "demo run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(JOB, folder / "job.sh")
    (folder / "input.txt").write_text("hello from the host\n")
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    with step(f"{USER}$ sbatch --vm-image=debian12 job.sh"):
        job = submit(lab, folder, "--mem=1000", "--vm-image=debian12", "job.sh")
        bare = submit(lab, folder, "--mem=100", "--output=bare.out", "--wrap=uname -r; hostname")
        shown = wait_for(lab, job)
    with step("The job's output (a guest's kernel, not this host's)"):
        print((folder / f"slurm-{job}.out").read_text())
        print(f"   this host: kernel {os.uname().release}, name {os.uname().nodename}")
    with step("The file that it wrote"):
        made = folder / "output.txt"
        print(f"   {made}: owner {made.owner()}, content {made.read_text()!r}")
    with step("What Slurm recorded"):
        print(
            "   " + "  ".join(word for word in shown.split() if word.startswith(("JobState=", "ExitCode=", "RunTime=")))
        )
    with step("The phases of the lease"):
        print(wnodes("lease", "trace", job))
    with step("A bare job that ran on the same node meanwhile"):
        wait_for(lab, bare)
        print((folder / "bare.out").read_text())
    shutil.copy(folder / f"slurm-{job}.out", DEMO / "job.out")
    if "ExitCode=3:0" not in shown or made.owner() != USER:
        sys.exit("demo: this is not what the script does: see above")


def submit(lab: Lab, folder: Path, *argv: str) -> str:
    """sbatch as the ordinary user; the job's id."""
    return lab.run_as(USER, ["sbatch", "--parsable", *argv], cwd=str(folder)).text.strip().partition(";")[0]


def wait_for(lab: Lab, job: str) -> str:
    """``scontrol show job`` once the job is over. Progress is a line every few seconds."""
    began, told = time.monotonic(), 0.0
    while True:
        shown = lab.run(["scontrol", "show", "job", job])
        state = shown.partition("JobState=")[2].split()[0]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return shown
        waited = time.monotonic() - began
        if waited > 240:
            sys.exit(f"demo: job {job} is still {state} after 4 minutes")
        if waited - told > 4:
            told = waited
            print(f"   job {job}: {state}, {waited:.0f} s", flush=True)
        time.sleep(0.2)


def left_behind() -> list[str]:
    """Processes, mounts, sockets and lease folders that still name the demo."""
    words = (str(DEMO), f"{sys.executable} -I -m wnodes_core.keeper")
    found = [f"process {p.pid}: {' '.join(p.command)[:120]}" for p in processes.table()
             if p.pid != os.getpid() and any(w in " ".join(p.command) for w in words) and "demo.py" not in " ".join(p.command)]  # fmt: skip
    found += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(DEMO) in line]
    found += [
        f"socket {line.split()[-1]}" for line in Path("/proc/net/unix").read_text().splitlines() if str(DEMO) in line
    ]
    leases = DEMO / "state" / "leases"
    return found + [f"lease folder {path}" for path in (leases.iterdir() if leases.exists() else ()) if path.is_dir()]


def main() -> int:
    """All steps, and the way back."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep Slurm and wnodesd until Enter is pressed")
    options = parser.parse_args()
    shutil.rmtree(DEMO / "slurm", ignore_errors=True)
    DEMO.mkdir(parents=True, exist_ok=True)
    (DEMO / "wnodes.yaml").write_text(CONFIG.format(demo=DEMO))
    with ExitStack() as stack:
        with step("Add the image to the node's store"):
            add_image()
        user = make_user(stack)
        lab = Lab(DEMO / "slurm")
        with step("Start wnodesd"):
            start_wnodesd(stack)
        with step("Enable the Slurm adapter, as an admin would"):
            lab.write()
            stack.callback(lab.down)
            where = ["--prefix", str(DEMO / "slurm-hooks"), "--run-dir", str(RUN), "--slurm-conf", str(lab.conf)]
            print(wnodes("slurm", "install", "--apply", *where))
        with step("Start a Slurm of our own on loopback: munged, slurmctld, slurmd"):
            lab.start()
        run_job(lab, user)
        with step("The same library without Slurm, wnodesd or root"):
            stack.callback(clear_user, user)
            run_embedded(user)
        if options.keep:
            input(f"\nKept running; SLURM_CONF={lab.conf}. Press Enter to stop everything. ")
        with step("Stop everything"):
            stack.close()
    left = left_behind()
    print(
        "\n== Left behind: "
        + ("nothing: no process, mount, socket or lease" if not left else "\n   ".join(["", *left]))
    )
    print(
        f"\ndemo: {'done' if not left else 'FAILED'} in {time.monotonic() - _began:.0f} s; {DEMO}/job.out is the job's output"
    )
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
