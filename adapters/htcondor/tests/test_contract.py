"""HTCondor keeps the contract of every adapter; ads were captured from HTCondor 23.9.6."""

from __future__ import annotations

from pathlib import Path

from wnodes_core.api import Job, Phase, VmRequest, errors
from wnodes_core.testing import Answer, Call, Facts, Live, LrmsContract, Outcome, TaskCall, public_copy

CAPTURED, MADE = (public_copy(Path(__file__).with_name(name)) for name in ("captured", "made"))
VM, BARE, WRONG = CAPTURED / "job-ad-23.txt", MADE / "job-bare.ad", MADE / "job-wrong.ad"
OPTIONS = ("-S", "/tmp", "-S", "/var/tmp", "-W", "/s", "--pwd", "/s", "-B", "/s", "--home", "/s", "-C")


def ad(path: Path) -> dict[str, str]:
    """The starter's environment: it names the job's ad."""
    return {"_CONDOR_JOB_AD": str(path), "_CONDOR_SCRATCH_DIR": "/s", "_CONDOR_SLOT": "slot1_1"}


def always(code: int, *stdout: str) -> dict[Outcome, Answer]:
    return dict.fromkeys(Outcome, Answer(code, stdout=stdout))


TEST = ("-s", "-q", "test", *OPTIONS, "wnodes:el9")
# "test" never fails for what wnodesd says: the job would go back to its queue without an end. "exec" meets it again.
NEVER = {**always(0), Outcome.BUG: Answer(1)}
CRON = {**always(0, "HasWnodes = false", "- update:true"), Outcome.BUG: Answer(1)}  # no wnodesd has written its file
ASKS = VmRequest.parse("image=debian12:latest,cpus=1,mount=/data:/data:ro")


class TestHtcondor(LrmsContract):
    lrms = "htcondor"
    marks = {"@CHIRP@": "/nonexistent/condor_chirp", "@APPTAINER@": "/bin/true"}
    calls = (
        Call("test", Phase.PREPARE, "runtime", argv=TEST, as_user=True, environ=ad(VM), asks=ASKS, answers=NEVER),
        Call(
            "misspelt",
            Phase.PREPARE,
            "runtime",
            argv=TEST,
            as_user=True,
            environ=ad(WRONG),
            refused=errors.BadRequest,
            answers=NEVER,
        ),
        Call("ordinary", Phase.PREPARE, environ=ad(BARE)),
        Call(
            "sites-container",
            Phase.PREPARE,
            "runtime",
            argv=("-s", "exec", *OPTIONS, "docker://x", "/s/job", "a b"),
            as_user=True,
        ),
        Call("cron", Phase.ADVERTISE, "advertise", as_user=True, asks=VmRequest(), answers=CRON),
    )
    facts = (
        Facts(
            Job("htcondor", "1.0", "slot1_1", 1001, 1001, "ann"),
            (CAPTURED / "who-23.txt").read_text(),
            {"cpus": 1, "memory_mib": 128},
        ),
    )
    live = (Live("7.0\n8.1\n", frozenset({"7.0", "8.1"})),)
    tasks = (
        TaskCall(("runtime", "-s", "exec", *OPTIONS, "wnodes:el9", "/s/job", "a b"), ad(VM), means=("/s/job", "a b")),
        TaskCall(("enter", "--", "/bin/sh", "-c", "x"), {}, means=("/bin/sh", "-c", "x")),
    )
    elsewhere = {"enter": "sshd calls it, not the LRMS: tests/integration/test_condor_jobs.py"}
    daemons = (("condor_starter", "condor_starter"),)

    def launch(self, line: str) -> Call:
        argv = ("-s", "exec", *OPTIONS, "wnodes:el9", "/bin/sh", "-c", line)
        return Call("exec", Phase.LAUNCH, "runtime", argv=argv, environ=ad(VM), as_user=True)
