"""Slurm keeps the contract of every adapter; the calls were captured from Slurm 22.05.8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from wnodes_core.api import Job, Phase, VmRequest, errors
from wnodes_core.testing import Answer, Call, Facts, Live, LrmsContract, Outcome, TaskCall

CAPTURED = Path(__file__).with_name("captured")


def captured(name: str) -> dict[str, str]:
    """A captured environment; the scripts' own scancel finds no cluster and ends at once."""
    return {**json.loads((CAPTURED / name).read_text()), "SLURM_CONF": "/dev/null"}


PROLOG, EPILOG, TWO_NODES = map(captured, ("prolog-env.json", "epilog-env.json", "prolog-env-two-nodes.json"))


def text_of(name: str) -> str:
    """A captured text without its heading."""
    return (CAPTURED / name).read_text().partition("\n")[2]


def bare(environ: Mapping[str, str]) -> dict[str, str]:
    """The same call for a job that asked for no VM."""
    return {name: text for name, text in environ.items() if "SPANK" not in name}


def refusals(job: str) -> dict[Outcome, Answer]:
    """What slurmd and the user see of a Prolog; only a sick host may make it fail."""
    tell = (("scontrol", "update", f"JobId={job}"), ("scontrol", "notify", job))
    later = Answer(0, (*tell, ("scontrol", "requeue", job), ("scancel", "--state=RUNNING", job)))
    return {
        Outcome.GRANTED: Answer(0),
        Outcome.HOLD: Answer(0, (*tell, ("scancel", job))),
        Outcome.REQUEUE: later,
        Outcome.AWAY: later,
        Outcome.DRAIN: Answer(1, (*tell, ("scontrol", "update", "NodeName=n0", "State=DRAIN"))),
        Outcome.BUG: Answer(0),  # the script itself cancels the job then
    }


def always(code: int) -> dict[Outcome, Answer]:
    return dict.fromkeys(Outcome, Answer(code))


class TestSlurm(LrmsContract):
    lrms = "slurm"
    calls = (
        Call(
            "prolog",
            Phase.PREPARE,
            "prolog",
            environ=PROLOG,
            asks=VmRequest("debian12"),
            job_id="1",
            answers=refusals("1"),
        ),
        Call(
            "prolog-grammar",
            Phase.PREPARE,
            "prolog",
            environ=TWO_NODES,
            asks=VmRequest("el9", cpus=2),
            job_id="2",
            answers=refusals("2"),
        ),
        Call(
            "prolog-malformed",
            Phase.PREPARE,
            "prolog",
            environ={**PROLOG, "SPANK_VM": "imgae=x"},
            refused=errors.BadRequest,
            answers=refusals("1"),
        ),
        Call("prolog-ordinary", Phase.PREPARE, "prolog", environ=bare(PROLOG)),
        Call("epilog", Phase.FINISH, "epilog", environ=EPILOG, asks=VmRequest(), job_id="1", answers=always(0)),
        Call("epilog-ordinary", Phase.FINISH, "epilog", environ=bare(EPILOG)),
        Call("healthcheck-idle", Phase.ADVERTISE, "healthcheck", environ={"SLURMD_NODENAME": "n0"}),
        Call("option-ordinary", Phase.SUBMIT, environ={"SLURM_JOB_NAME": "x"}),
    )
    facts = (
        Facts(
            Job("slurm", "1", "n0", 2002, 2002, ""),
            text_of("scontrol-job-one-node.txt"),
            {"cpus": 1, "memory_mib": 200},
        ),
        Facts(
            Job("slurm", "2", "n1", 2002, 2002, ""),
            text_of("scontrol-job-two-nodes.txt"),
            {"cpus": 2, "memory_mib": 100},
        ),
    )
    live = (Live(text_of("squeue-node.txt"), frozenset({"3", "6"})),)
    tasks = (
        TaskCall(("/l", "-n", "a b"), {"WNODES_ARGV0": "/bin/echo", "A": "1"}, ("/bin/echo", "-n", "a b")),
        TaskCall(("/l", "--", "/bin/echo", "-n"), {}, ("/bin/echo", "-n")),
    )
    daemons = (("slurmstepd", "slurmstepd: [1.batch]"), ("slurmstepd-wlm", "slurmstepd: [1.0]"))

    def launch(self, line: str) -> Call:
        environ = {"WNODES_ARGV0": "/bin/sh", "SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n0"}
        return Call("task", Phase.LAUNCH, "launch", argv=("-c", line), environ=environ)
