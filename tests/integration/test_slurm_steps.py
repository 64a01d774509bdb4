"""One VM per job and node: batch script, srun, nested srun, salloc, arrays, several nodes - and no way out.

A booted kernel has an id of its own (/proc/sys/kernel/random/boot_id), so the id says which VM a
command ran in; the host's says that it ran bare. Each job does much, because its VM takes seconds.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_site import SHARED, Site, until

from wnodes_core import command
from wnodes_core.model import Image

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
ID = "/proc/sys/kernel/random/boot_id"
HOST = Path(ID).read_text().strip()
MARKED = 't() { echo "@@$1"; }\n'


@pytest.fixture(scope="module")
def site(minimal_image: Image) -> Iterator[Site]:
    with Site(minimal_image, "s", build=SHARED, nodes=2, features="vm,vm_debian12") as site:
        yield site


@pytest.fixture(autouse=True)
def idle_again(site: Site) -> Iterator[None]:
    yield
    site.assert_nothing_left()
    until(lambda: site.nodes() == {"idle"}, f"idle nodes: {site.nodes()}")


def parts(text: str) -> dict[str, list[str]]:
    """What a script printed, by its marks (``t NAME``); our own progress is left out."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if line.startswith("@@"):
            name = line[2:]
            found[name] = []
        elif not line.startswith(("wnodes: booting", "srun: error:")):
            found[name].append(line)
    return found


def run_job(site: Site, script: str, *options: str, **how: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Run a batch job to its end: its output by marks, its fields."""
    job = site.submit(MARKED + script, *options, **how)
    fields = site.ended(job)
    return parts(site.output(job)), {**fields, "job": job, "output": site.output(job)}


def at_terminal(site: Site, argv: list[str], lines: list[str]) -> tuple[str, int]:
    """Type lines at a command's prompt ``$ ``, on a terminal of 33 x 101; its output and exit code."""
    import fcntl
    import struct
    import termios

    uid, gid, groups = site.lab.identity(site.user)
    environ = {**site.lab.environ, "SHELL": "/bin/bash", "HOME": "/", "PS1": "$ ", "TERM": "dumb"}
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            os.chdir(site.work)
            os.execvpe(argv[0], argv, environ)
        finally:
            os._exit(127)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    text, deadline = _converse(fd, list(lines)), time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.05)
    os.close(fd)
    return text, os.waitstatus_to_exitcode(ended[1])


def _converse(fd: int, lines: list[str]) -> str:
    text, seen, deadline = b"", 0, time.monotonic() + 90
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                data = os.read(fd, 65536)
            except OSError:  # EIO: the other side has gone
                break
            text += data
        if lines and re.search(rb"\$ \Z", text[seen:]):
            seen = len(text)
            os.write(fd, lines.pop(0).encode() + b"\r")
    return text.decode(errors="replace").replace("\r", "")


STEPS = f"""
t id; cat {ID}; echo hello > /tmp/private
t step; srun sh -c 'cat {ID} /tmp/private; echo two >> /tmp/private; uname -r'
t seen; cat /tmp/private
t hidden; ls -A FOLDER; ls -A FOLDER/state FOLDER/run FOLDER/hooks 2>&1 | grep -c 'cannot access'
t clean; env -i SLURM_CONF=$SLURM_CONF SLURM_JOB_ID=$SLURM_JOB_ID $(command -v srun) cat {ID}
t none; srun --export=NONE cat {ID}
t overlap; srun --overlap cat {ID}
t other; srun --vm-image=other --vm=cpus=1 cat {ID}
t unset; unset ${{!SLURM_SPANK*}} ${{!SPANK*}} ${{!WNODES*}}; srun cat {ID}
t squeue; squeue -h -o '%i %T'
t scontrol; scontrol -o show job $SLURM_JOB_ID
t sbatch; sbatch --parsable --output=second-%j --wrap 'cat {ID}; echo "$PATH"'
t refused; ln -s /usr/lib/wnodes/bin/srun /tmp/bash; /tmp/bash -c id 2> /tmp/err; echo $?; cat /tmp/err
t path; mkdir /tmp/bin; printf '#!/bin/sh\\necho mine $LD_LIBRARY_PATH $PYTHONPATH\\n' > /tmp/bin/wn-tool
chmod 755 /tmp/bin/wn-tool
PATH=/tmp/bin:$PATH LD_LIBRARY_PATH=/tmp/lib PYTHONPATH=/tmp/py srun wn-tool
t cancel; scancel $SLURM_JOB_ID; sleep 30; echo still
"""


def test_all_steps_of_a_job_share_one_vm_and_nothing_typed_inside_leaves_it(site):
    out, end = run_job(site, STEPS.replace("FOLDER", str(site.folder)), "--time=5")
    text = end["output"]
    boot = out["id"][0]
    assert boot != HOST, text
    assert out["step"][:2] == [boot, "hello"] and out["step"][2].endswith("-cloud-amd64"), text
    assert out["seen"] == ["hello", "two"], text
    for escape in ("clean", "none", "overlap", "other", "unset"):
        assert out[escape] == [boot], (escape, text)
    assert out["squeue"] == [f"{end['job']} RUNNING"], text
    assert out["scontrol"][0].startswith(f"JobId={end['job']} "), text
    assert out["refused"] == ["126", "bash: the host runs no 'bash' for this job"], text
    assert out["path"] == ["mine /tmp/lib /tmp/py"], text
    assert "still" not in text and end["JobState"] == "CANCELLED", text
    second = out["sbatch"][0]
    assert site.ended(second)["JobState"] == "COMPLETED"
    ran = (site.work / f"second-{second}").read_text().split()
    assert ran[0] == HOST and "/usr/bin" in ran[1], "a job without the option is an ordinary one"
    assert set(out["hidden"]) <= {"lab", "work", "3"} and out["hidden"][-1] == "3", text


FIDELITY = """
t args; printf '%s\\n' "$@"; basename "$0"
t self; id -u; id -g; id -G; umask; ulimit -n; ulimit -c; pwd; echo $TMPDIR; readlink /proc/self/fd/0; wc -c
t env; echo $SLURM_JOB_ID $SLURM_JOB_NAME $SLURMD_NODENAME $SLURM_PROCID $SLURM_CPUS_ON_NODE; printf '%s\\n' "$ODD"
set | grep -c ^WNODES_ARGV0
t code; srun sh -c 'exit 9'; echo $?
t segv; srun sh -c 'kill -SEGV $$'; echo $?
t binary; head -c 5000000 /dev/urandom > blob; md5sum < blob; srun cat < blob | md5sum
t apart; srun sh -c 'echo out; echo err >&2' 2> err; cat err
t labels; srun -l -n1 echo x
t tail; echo nonewline > "here ü"; printf tail
exit 3
"""


def test_script_and_steps_see_what_they_would_see_without_a_vm(site):
    folder = site.work / "blank 'quote\" ü"
    folder.mkdir()
    shutil.chown(folder, site.user, site.user)
    script = folder / "a script.sh"
    script.write_text("#!/bin/bash\n" + MARKED + FIDELITY)
    script.chmod(0o755)
    shell = (
        'cd "$1"; umask 027; ulimit -S -n 777; ulimit -S -c 0; export ODD=$\'a b\\nc"\\xc3\\xbc\'; exec sbatch'
        " --parsable --job-name=odd --vm=image=debian12,cpus=1 --output=out './a script.sh' 'x y' '' $'n\\nl' '*'"
    )
    job = site.run_as(["bash", "-c", shell, "sh", str(folder)]).text.strip()
    end = site.ended(job)
    text = (folder / "out").read_text()
    out = parts(text)
    uid, gid, groups = site.lab.identity(site.user)
    assert out["args"] == ["x y", "", "n", "l", "*", "slurm_script"], text
    assert out["self"][:3] == [str(uid), str(gid), " ".join(map(str, groups))], text
    assert out["self"][3:7] == ["0027", "777", "0", str(folder)] and out["self"][-1] == "0", text
    assert out["env"] == [f"{job} odd {end['NodeList']} 0 1", "a b", 'c"ü', "0"], text
    assert out["code"] == ["9"] and out["segv"] == ["139"], text
    assert "Exited with exit code 9" in text and "Segmentation fault" in text, text
    assert out["binary"][0] == out["binary"][1], text
    assert out["apart"] == ["out", "err"], text
    assert out["labels"] == ["0: x"], text
    assert text.endswith("tail") and end["ExitCode"] == "3:0", text
    made = folder / "here ü"
    assert made.read_text() == "nonewline\n" and made.owner() == site.user and made.stat().st_mode & 0o777 == 0o640


SIGNALS = f"""
trap 'echo script-usr1' USR1
echo started
srun sh -c 'trap "echo step-usr1; exit 0" USR1; echo step; while :; do sleep 0.2; done' &
wait; wait; wait
cat {ID}
kill -SEGV $$
"""


def test_signals_reach_whom_slurm_means_and_output_grows_while_it_runs(site):
    job = site.submit(SIGNALS)
    until(lambda: "step\n" in site.output(job), f"first output of {job}: {site.output(job)}", 60)
    site.run_as(["scancel", "-b", "-s", "USR1", job])
    until(lambda: "script-usr1" in site.output(job), "the script's signal", 20)
    assert "step-usr1" not in site.output(job)
    site.run_as(["scancel", "-s", "USR1", job])
    until(lambda: "step-usr1" in site.output(job), "the step's signal", 20)
    fields = site.ended(job)
    assert site.output(job).count("script-usr1") == 1, site.output(job)
    assert fields["ExitCode"] == "0:11" and fields["JobState"] == "FAILED", (fields, site.output(job))


def test_two_nodes_have_a_vm_each_and_both_end_clean(site):
    script = f"""
t id; cat {ID}
t first; srun sh -c 'echo $SLURMD_NODENAME $(hostname) $(cat {ID}); echo x >> /tmp/mine'
t again; srun sh -c 'echo $SLURMD_NODENAME $(hostname) $(cat {ID}); wc -l < /tmp/mine >&2'
"""
    out, end = run_job(site, script, "-N2")
    text, job = end["output"], end["job"]
    first, again = sorted(out["first"]), sorted(line for line in out["again"] if line != "1")
    assert first == again and len(first) == 2 and out["again"].count("1") == 2, text
    rows = [line.split() for line in first]
    assert [row[:2] for row in rows] == [["s0", f"wn-{job}-s0"], ["s1", f"wn-{job}-s1"]], text
    assert rows[0][2] == out["id"][0] and HOST not in (rows[0][2], rows[1][2]) and rows[0][2] != rows[1][2], text
    assert end["ExitCode"] == "0:0"


def test_srun_alone_with_stdin_and_mount_and_its_end(site):
    data = site.folder / "data"
    data.mkdir()
    data.chmod(0o777)
    (data / "f").write_text("seen\n")
    blob = os.urandom(1 << 20)
    script = f"cat {ID} >&2; cat /mnt/dir/f >&2; echo no > /mnt/dir/f || echo readonly >&2; cat; exit 5"
    argv = ["srun", f"--vm=image=debian12,cpus=1,mount={data}:/mnt/dir:ro", "sh", "-c", script]
    done = command.run(
        argv, stdin=blob, environ=site.lab.environ, cwd=str(site.work), check=False, timeout_s=120,
        become=site.lab.identity(site.user),
    )  # fmt: skip
    lines = done.stderr.decode().splitlines()
    assert done.stdout == blob and done.exit_code == 5, lines
    assert HOST not in lines and "seen" in lines and "readonly" in lines, lines
    assert (data / "f").read_text() == "seen\n"


def test_salloc_puts_its_shell_and_all_steps_into_one_vm(site):
    lines = [
        f"cat {ID}",
        f"srun cat {ID}",
        "stty size",
        "srun --pty sh -c 'tty; stty size'",
        "squeue -h -o 'state %T'",
        "exit 4",
    ]
    text, code = at_terminal(site, ["salloc", "--vm-image=debian12"], lines)
    ids = re.findall(r"^[0-9a-f]{8}-[0-9a-f-]{27}$", text, re.MULTILINE)
    assert len(ids) == 2 and len(set(ids)) == 1 and HOST not in ids, text
    assert text.count("\n33 101\n") == 2 and "\n/dev/pts/" in text and "\nstate RUNNING\n" in text, text
    assert code == 4, text


def test_salloc_with_a_command_runs_that_on_the_host_and_its_steps_in_one_vm(site):
    script = f"cat {ID}; for i in 1 2 3; do srun cat {ID}; done; srun --pty true; exit 6"
    done = site.run_as(["salloc", "--vm-image=debian12", "sh", "-c", script], check=False)
    ids = done.text.split()
    assert ids[0] == HOST and len(ids) == 4, done
    assert len(set(ids[1:])) == 1 and HOST not in ids[1:] and done.exit_code == 6, done


def test_srun_pty_is_a_terminal_in_the_guest(site):
    lines = ["tty", f"cat {ID}", "stty size", "exit 4"]
    text, code = at_terminal(site, ["srun", "--pty", "--vm-image=debian12", "bash", "--norc"], lines)
    ids = re.findall(r"^[0-9a-f]{8}-[0-9a-f-]{27}$", text, re.MULTILINE)
    assert len(ids) == 1 and ids[0] != HOST and "/dev/pts/" in text and "33 101" in text, text
    assert code == 4, text


def test_array_tasks_have_vms_of_their_own_and_the_option_may_stand_in_the_script(site):
    script = f"#SBATCH --vm-image=debian12\n{MARKED}t id; cat {ID}; echo $SLURM_ARRAY_TASK_ID $SLURM_ARRAY_JOB_ID\n"
    script += "exit $SLURM_ARRAY_TASK_ID\n"
    job = site.submit(script, "--array=1-3%2", image="")
    until(lambda: not site.lab.run(["squeue", "-h", "-j", job], check=False).strip(), "end of the array", 120)
    outs = [parts(site.output(job, str(task)))["id"] for task in (1, 2, 3)]
    assert [out[1] for out in outs] == [f"{task} {job}" for task in (1, 2, 3)], outs
    assert len({out[0] for out in outs} | {HOST}) == 4, outs
    text = site.lab.run(["scontrol", "-o", "show", "job", job])
    assert sorted(re.findall(r" ExitCode=(\d:\d)", text)) == ["1:0", "2:0", "3:0"], text


def test_a_constraint_asks_for_the_vm_where_no_plugin_can(site):
    out, end = run_job(site, f"t id; cat {ID}", "--constraint=vm_debian12", image="")
    assert out["id"][0] != HOST, end["output"]
