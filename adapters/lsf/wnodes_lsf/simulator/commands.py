"""bjobs, bkill, bstop, bresume, brequeue, bmod, bswitch: as users and wnodesd call them."""

from __future__ import annotations

import json
import os
import pwd
import re
import sys
from typing import Any

from wnodes_lsf.simulator import bsub, esubs, wire
from wnodes_lsf.simulator.conf import Conf
from wnodes_lsf.simulator.options import VALUED

FIELDS = (
    "jobid",
    "jobindex",
    "stat",
    "user",
    "queue",
    "exec_host",
    "job_name",
    "exit_code",
    "from_host",
    "slots",
    "command",
)
ERROR = 255


def main() -> int:
    """Dispatch by the name that we were called by."""
    name = os.environ.get("LSB_SIM_COMMAND", "")
    conf = Conf.read()
    try:
        return {
            "bjobs": bjobs,
            "bkill": lambda c, a: _signal(c, _signal_of(a), _specs(a), "is being terminated"),
            "bstop": lambda c, a: _signal(c, "STOP", _specs(a), "is being stopped"),
            "bresume": lambda c, a: _signal(c, "CONT", _specs(a), "is being resumed"),
            "brequeue": brequeue,
            "bmod": bmod,
            "bswitch": bswitch,
        }[name](conf, sys.argv[1:])
    except (wire.Refused, OSError) as error:
        print(error, file=sys.stderr)
        return ERROR


def bjobs(conf: Conf, argv: list[str]) -> int:
    """``bjobs [-u USER] [-a] [-m HOST] [-noheader] [-json] [-o FIELDS] [JOB]…``"""
    options = dict.fromkeys(word for word in argv if word in ("-a", "-noheader", "-json", "-w", "-r"))
    values = {argv[i]: argv[i + 1] for i in range(len(argv) - 1) if argv[i] in ("-u", "-m", "-o")}
    fields = (values.get("-o") or " ".join(FIELDS[:7])).split()
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise wire.Refused(f"{unknown[0]}: unknown field name")
    user = values.get("-u") or pwd.getpwuid(os.getuid()).pw_name
    question = {"op": "jobs", "specs": _specs(argv), "user": user, "all": "-a" in options, "host": values.get("-m")}
    jobs = wire.ask(conf.socket, question)["jobs"]
    if "-json" in options:
        records = [{name.upper(): job[name] for name in fields} for job in jobs]
        print(json.dumps({"COMMAND": "bjobs", "JOBS": len(jobs), "RECORDS": records}, indent=2))
        return 0
    if not jobs:
        print("No unfinished job found", file=sys.stderr)
        return ERROR
    if "-noheader" not in options:
        print(" ".join(name.upper() for name in fields))
    for job in jobs:
        print(" ".join(job[name] or "-" for name in fields))
    return 0


def _specs(argv: list[str]) -> list[str]:
    after = {i + 1 for i, word in enumerate(argv) if word in ("-u", "-m", "-o", "-s", *VALUED)}
    return [word for i, word in enumerate(argv) if i not in after and re.fullmatch(r"\d+(\[\d+\])?", word)]


def _signal_of(argv: list[str]) -> str:
    """``bkill -s NAME``; ``-s KILL`` is the same staged sequence as none (T)."""
    return argv[argv.index("-s") + 1].removeprefix("SIG") if "-s" in argv else "KILL"


def _signal(conf: Conf, name: str, specs: list[str], what: str) -> int:
    wire.ask(conf.socket, {"op": "signal", "specs": specs, "signal": name})
    for spec in specs:
        print(f"Job <{spec}> {what}")
    return 0


def brequeue(conf: Conf, argv: list[str]) -> int:
    """``brequeue JOB…``"""
    wire.ask(conf.socket, {"op": "requeue", "specs": _specs(argv)})
    return 0


def bswitch(conf: Conf, argv: list[str]) -> int:
    """``bswitch QUEUE JOB…``"""
    wire.ask(conf.socket, {"op": "switch", "specs": _specs(argv[1:]), "queue": argv[0]})
    return 0


def bmod(conf: Conf, argv: list[str]) -> int:
    """``bmod OPTION… JOB``: the esubs run; the command line that they see is the job's id (T)."""
    options, words = bsub.parse(argv)
    outcome = esubs.run_all(conf, "bmod", options | {"MODIFY": "Y", "COMMAND_LINE": " ".join(words)}, dict(os.environ))
    if outcome.refused:
        raise wire.Refused("Request aborted by esub. Job not modified.")
    changes: dict[str, Any] = {k: v for k, v in outcome.options.items() if k not in ("MODIFY", "COMMAND_LINE")}
    wire.ask(conf.socket, {"op": "modify", "specs": words, "options": changes})
    print(f"Parameters of job <{words[0]}> are being changed")
    return 0
