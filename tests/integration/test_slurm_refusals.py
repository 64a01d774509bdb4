"""What Slurm jobs may not have: refused with value and wish, no bare run, node idle, nothing left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_site import IMAGES, Site, until

from wnodes_core import command
from wnodes_core.errors import WnodesError
from wnodes_core.images.store import Store
from wnodes_core.model import Image
from wnodes_core.plugins import Plugins

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
SETTINGS = """\
vm:
  boot_timeout_s: 4
policy:
  - users: ["wnodes-t1"]
    images: [debian12, wnodes-zeros, missing]
    allow_mounts: [/var/tmp]
"""


@pytest.fixture(scope="module")
def site(minimal_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    store = Store(IMAGES, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    zeros = tmp_path_factory.mktemp("zeros") / "zeros.raw"
    zeros.write_bytes(bytes(1 << 20))
    if not any(entry.name == "wnodes-zeros" for entry in store.entries()):
        store.add(str(zeros), "wnodes-zeros", format="raw")
    with Site(minimal_image, "r", settings=SETTINGS, extra=["MaxArraySize=10"]) as site:
        yield site
    with suppress(WnodesError):
        store.remove("wnodes-zeros")


@pytest.fixture(autouse=True)
def idle_again(site: Site) -> Iterator[None]:
    yield
    site.assert_nothing_left()
    until(lambda: site.nodes() == {"idle"}, f"idle node: {site.nodes()}")


def _comment(site: Site, job: str) -> str:
    """AdminComment, the only place where the user of a batch job reads why."""
    text = site.lab.run(["scontrol", "-o", "show", "job", job])
    return text.partition(" AdminComment=")[2].partition(" WorkDir=")[0]


def _refused(site: Site, *options: str, image: str = "debian12") -> str:
    """Submit a job that must be refused before it runs; what its user is told."""
    mark = site.work / f"ran-{time.monotonic_ns()}"
    job = site.submit(f"touch {mark}", "-n1", *options, image=image)
    fields = site.ended(job, 30)
    assert fields["JobState"] == "CANCELLED", fields
    assert not mark.exists() and not site.output(job)
    assert site.lease(job) == {}
    return _comment(site, job)


REFUSALS = {
    "image that the policy lacks": (("--vm-image=secret",), ("'secret'", "debian12")),
    "unknown image": (("--vm-image=missing",), ("'missing'",)),
    "more cpus than the job": (("--vm=cpus=2",), ("cpus 2", "1")),
    "more memory than the job": (("--vm=memory=4G",), ("memory 4096 MiB", "800 MiB")),
    "too little memory": (("--vm=memory=64M",), ("memory 64 MiB", "at least")),
    "mount outside policy": (("--vm=mount=/etc:/mnt/etc:ro",), ("'/etc'", "/var/tmp")),
    "mount past the policy by dots": (("--vm=mount=/var/tmp/../../etc:/mnt/etc",), ("/var/tmp/../../etc",)),
    "relative target": (("--vm=mount=/var/tmp:data",), ("'data'", "absolute")),
    "target of the guest's own": (("--vm=mount=/var/tmp:/etc",), ("/etc",)),
    "unknown key": (("--vm=imagee=debian12",), ("imagee", "image")),
    "no number": (("--vm=cpus=many",), ("many",)),
    "quotes and shell": (("--vm=mount=/var/tmp/'\"$(touch /tmp/pwned)`id`;x:y",), ("$(touch /tmp/pwned)",)),
    "path of 4 kB": (("--vm=mount=/" + "x" * 4100 + ":/mnt/x",), ("xxx",)),
    "words of scontrol": (("--vm=mount=/var/tmp:/etc/x State=DOWN NodeName=r0",), ("/etc/x State=DOWN",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_wish_is_refused_on_the_node_with_value_and_wish(site, case):
    options, words = REFUSALS[case]
    told = _refused(site, *options)
    assert told.startswith("wnodes: ") and all(word in told for word in words), told
    assert not Path("/tmp/pwned").exists()


CLIENT = {
    "image": ("--vm-image=../../etc/passwd", "want NAME"),
    "blank image": ("--vm-image=a b", "want NAME"),
    "option as image": ("--vm-image=-rf", "want NAME"),
    "no pair": ("--vm=debian12", "want KEY=VALUE"),
    "newline": ("--vm=image=debian12\nState=DOWN", "control character at byte 14"),
    "8 kB": ("--vm=mount=/" + "x" * 9000, "at most 8191 bytes"),
}


@pytest.mark.parametrize("case", CLIENT)
@pytest.mark.parametrize("tool", ["sbatch", "srun", "salloc"])
def test_malformed_text_is_refused_before_submission(site, tool, case):
    option, want = CLIENT[case]
    last = ["--wrap=true"] if tool == "sbatch" else ["true"]
    done = site.run_as([tool, option, *last], check=False)
    assert done.exit_code != 0 and want in done.stderr.decode()
    assert site.lab.run(["squeue", "-h"]) == ""


def test_srun_and_salloc_read_the_refusal_on_their_terminal(site):
    mark = site.work / "ran"
    for tool in ("srun", "salloc"):
        done = site.run_as([tool, "--vm-image=secret", "touch", str(mark)], check=False)
        assert done.exit_code != 0, done
        assert "image 'secret' is not allowed for you here: want one of debian12" in done.stderr.decode()
        assert not mark.exists()


def test_an_array_and_two_constraints_are_refused_each_task_by_itself(site):
    job = site.submit("touch ran-$SLURM_ARRAY_TASK_ID", "--array=1-2", "--vm=cpus=9")
    until(lambda: not site.lab.run(["squeue", "-h"]), "end of the array")
    text = site.lab.run(["scontrol", "-o", "show", "job", job])
    assert text.count("JobState=CANCELLED") == 2 and text.count("cpus 9 asked for") == 2
    assert not list(site.work.glob("ran-*"))


@pytest.mark.parametrize("path", ["blank and ü", "quote'\"x", "$(id);`x`", "n" * 200])
def test_a_job_without_vm_is_untouched_whatever_its_folder_is_called(site, path):
    folder = site.work / path
    folder.mkdir()
    folder.chmod(0o777)
    script = "cat /proc/sys/kernel/random/boot_id; pwd; echo e >&2; env | grep -c -i wnodes; exit 3"
    argv = ["sbatch", "--wait", "--output=out", "--error=err", "--chdir", str(folder), "--wrap", script]
    assert site.run_as(argv, check=False).exit_code == 3
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    lines = (folder / "out").read_text().splitlines()
    assert lines[0] == boot.strip() and lines[1] == str(folder)
    assert (folder / "err").read_text() == "e\n"


def test_a_guest_that_never_boots_fails_the_job_and_not_the_node(site):
    mark = site.work / "booted"
    job = site.submit(f"touch {mark}", "--no-requeue", image="wnodes-zeros")
    done = site.run_as(["srun", "--vm-image=wnodes-zeros", "touch", str(mark)], check=False)
    fields = site.ended(job)
    assert fields["JobState"] == "FAILED" and fields["ExitCode"] == "125:0"
    assert done.exit_code == 125
    for told in (site.output(job), done.stderr.decode()):
        assert "wnodes: error: the guest did not answer within 4 s and wrote nothing to its console" in told, told
    assert not mark.exists()


def test_a_user_cannot_play_the_prolog(site):
    """A marker or a lease comes from root only, and a launcher outside a VM job runs nothing."""
    run = site.folder / "run" / "slurm"
    state = site.folder / "state"
    for argv in (["touch", f"{run}/1.r0"], ["ls", str(state / "leases")], ["touch", f"{state}/x"]):
        assert site.run_as(argv, check=False).exit_code, argv
    mark = site.work / "ran"
    done = site.run_as([str(site.folder / "hooks" / "launch"), "touch", str(mark)], check=False)
    assert done.exit_code == 125 and b"wnodes: error:" in done.stderr and not mark.exists()
    become = site.lab.identity(site.user)
    code = (
        "import sys; from wnodes_core.agent.client import call;"
        "call({'op': 'prepare', 'lrms': 'slurm', 'request': {}, 'job': {}}, timeout_s=5, path=sys.argv[1])"
    )
    argv = [sys.executable, "-I", "-c", code, str(site.folder / "run" / "wnodesd.sock")]
    assert command.run(argv, become=become, check=False).exit_code
