"""LSF keeps the contract of every adapter. Calls follow IBM's pages and what a descendant of LSF 4.2 was seen to do."""

from __future__ import annotations

import json
from pathlib import Path

from wnodes_core.api import Job, Phase, VmRequest, errors
from wnodes_core.testing import Answer, Call, Facts, Live, LrmsContract, Outcome, TaskCall, public_copy

CAPTURED = public_copy(Path(__file__).with_name("captured"))
JOB = {
    "LSB_JOBID": "101",
    "LSB_JOBINDEX": "0",
    "LSB_QUEUE": "vm",
    "LSB_JOBFILENAME": "/home/ann/.lsbatch/1.101",
    "LS_JOBPID": "999999999",
    "LSFUSER": "ann",
    "LSF_ENVDIR": "/nonexistent",
}
VM = {**JOB, "WNODES_REQUEST": "image=el9,cpus=2"}
ASKS = VmRequest("el9", cpus=2)
FILES = {
    "LSB_SUB_MODIFY_FILE": "{folder}/modify",
    "LSB_SUB_MODIFY_ENVFILE": "{folder}/env",
    "LSB_SUB_ABORT_VALUE": "97",
}
READS = ("bsub=1", "queues=vm", "--")  # the script's own words
BJOBS = json.dumps(
    {"COMMAND": "bjobs", "JOBS": 1, "RECORDS": [
        {"JOBID": "101", "STAT": "RUN", "USER": "ann", "QUEUE": "vm", "EXEC_HOST": "2*n0"},
    ]}
)  # fmt: skip


def submits(name: str) -> dict[str, str]:
    """bsub's environment for its esub: the parameter file says what is submitted."""
    return {"LSB_SUB_PARM_FILE": str(CAPTURED / f"{name}.parm"), **FILES}


def always(code: int, *, silent: bool = False) -> dict[Outcome, Answer]:
    return dict.fromkeys(Outcome, Answer(code, silent=silent))


ESUB = {
    Outcome.GRANTED: Answer(
        0, stdout=('WNODES_REQUEST="image=el9,cpus=2"',), files={"env": "WNODES_REQUEST=", "modify": "vm"}
    ),
    Outcome.HOLD: Answer(97),
    Outcome.BUG: Answer(97),
}
PRE = {
    Outcome.GRANTED: Answer(0),
    Outcome.HOLD: Answer(99),
    Outcome.REQUEUE: Answer(1),
    Outcome.AWAY: Answer(1),
    Outcome.DRAIN: Answer(1),
    Outcome.BUG: Answer(99),
}


def eexec(when: str, environ: dict[str, str]) -> dict[str, str]:
    return {**environ, "LS_EXEC_T": when}


class TestLsf(LrmsContract):
    lrms = "lsf"
    marks = {"@PREFIX@": "{hooks}/none", "@SITE@": "queues=vm", "@QUEUES@": "vm", "@IMAGES@": "el9"}
    calls = (
        Call("esub", Phase.SUBMIT, "esub", environ=submits("vm"), reads=READS, as_user=True, asks=ASKS, answers=ESUB),
        Call(
            "esub-typo",
            Phase.SUBMIT,
            "esub",
            environ=submits("wrong"),
            reads=READS,
            as_user=True,
            refused=errors.BadRequest,
            answers=ESUB,
        ),
        Call("esub-ordinary", Phase.SUBMIT, "esub", environ=submits("bare"), as_user=True),
        Call(
            "eexec-start",
            Phase.PREPARE,
            "eexec",
            environ=eexec("START", VM),
            as_user=True,
            asks=ASKS,
            answers=always(0, silent=True),
        ),
        Call(
            "eexec-end",
            Phase.FINISH,
            "eexec",
            environ=eexec("END", VM),
            as_user=True,
            asks=VmRequest(),
            answers=always(0, silent=True),
        ),
        Call(
            "eexec-ordinary",
            Phase.PREPARE,
            "eexec",
            environ=eexec("START", JOB),
            as_user=True,
            stdin=b"site's own words\n",
        ),
        Call("pre", Phase.PREPARE, "pre_exec", environ=VM, as_user=True, asks=ASKS, answers=PRE),
        Call("post", Phase.FINISH, "post_exec", environ=VM, as_user=True, asks=VmRequest(), answers=always(0)),
        Call(
            "elim",
            Phase.ADVERTISE,
            "elim.wnodes",
            asks=VmRequest(),
            endless=True,
            answers=dict.fromkeys(Outcome, Answer(0, stdout=("vmslots 0",), silent=True)),
        ),
    )
    facts = (Facts(Job("lsf", "101", "n0", 1000, 1000, "ann"), BJOBS, {"cpus": 2, "queue": "vm"}),)
    live = (
        Live("101 0\n102 3\n", frozenset({"101", "102_3"})),
        Live("No unfinished job found\n", frozenset()),
    )
    tasks = (
        TaskCall(("launch", "a; b 'c'"), {}, means=("/bin/sh", "-c", "a; b 'c'")),
        TaskCall(("launch", "--b64 ZWNobyAnYSBiJw=="), {}, means=("/bin/sh", "-c", "echo 'a b'")),
    )
    daemons = (("sbatchd", "sbatchd"),)

    def launch(self, line: str) -> Call:
        return Call("starter", Phase.LAUNCH, "launch", argv=(line,), environ=VM, as_user=True)
