"""The esubs of one submission, as bsub runs them: in its own process tree, as the user (D/T)."""

from __future__ import annotations

import base64
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from wnodes_lsf.simulator import spawn
from wnodes_lsf.simulator.conf import Conf
from wnodes_lsf.simulator.options import KNOWN

ABORT = 97  # LSB_SUB_ABORT_VALUE (T)
_LINE = re.compile(rb'LSB_SUB\d*_([A-Z0-9_]+)=(?:"(.*)"|(\d+|Y)|SUB_RESET)[ \t]*\Z')


@dataclass
class Outcome:
    """What the esubs made of the submission."""

    options: dict[str, str]
    environ: dict[str, str]
    data: str = ""  # for eexec, base64
    refused: bool = False
    ran: list[str] = field(default_factory=list)


def run_all(conf: Conf, invoked_as: str, options: Mapping[str, str], environ: Mapping[str, str]) -> Outcome:
    """Run the esubs of this submission in order; the job's options and environment after them."""
    outcome = Outcome(dict(options), dict(environ))
    for name, arguments in _chosen(conf, options.get("ADDITIONAL", ""), environ):
        path = f"{conf.serverdir}/{name}"
        if not os.access(path, os.X_OK):
            # T: a method that is not there is silently skipped; 10.1 refuses the job (D: bsub.a).
            if conf.documented and name != "esub":
                print(f"{name}: esub is not found. Job not submitted.", file=sys.stderr)
                outcome.refused = True
                return outcome
            continue
        _one(conf, invoked_as, path, arguments, outcome)
        if outcome.refused:
            return outcome
    return outcome


def _chosen(conf: Conf, additional: str, environ: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Names in order: esub, LSB_ESUB_METHOD (the environment's replaces lsf.conf's: T), then ``-a`` (D/T)."""
    methods = environ.get("LSB_ESUB_METHOD", conf.get("LSB_ESUB_METHOD").strip('"')).split()
    chosen: list[tuple[str, list[str]]] = [("esub", [])]
    chosen += [(f"esub.{name}", []) for name in methods]
    if not conf.documented:
        # T knows no arguments: it looks for a file of that very name; argv is "-r" alone.
        chosen += [(f"esub.{word}", ["-r"]) for word in additional.split()]
        return chosen
    for name, arguments in re.findall(r"([A-Za-z0-9_-]+)(?:\(([^()]*)\))?", additional):
        chosen.append((f"esub.{name}", [word.strip() for word in arguments.split(",") if word.strip()]))  # M
    return chosen


def parameter_text(conf: Conf, options: Mapping[str, str]) -> bytes:
    """The parameter file: options given, no escaping whatever (T); booleans Y, numbers bare (D)."""
    lines = []
    for name, value in options.items():
        if name == "COMMAND_LINE" and conf.get("LSB_SUB_COMMANDNAME").lower() != "y":
            continue
        digit = {"APP": "3", "POST_EXEC": "3"}.get(name, "") if conf.documented else ""
        raw = os.fsencode(value)
        bare = re.fullmatch(rb"\d+|Y|SUB_RESET", raw) and name not in ("JOB_NAME", "COMMAND_LINE", "ADDITIONAL")
        lines.append(f"LSB_SUB{digit}_{name}=".encode() + (raw if bare else b'"' + raw + b'"') + b"\n")
    return b"".join(lines)


def _one(conf: Conf, invoked_as: str, path: str, arguments: list[str], outcome: Outcome) -> None:
    files = {kind: _temporary() for kind in ("PARM", "MODIFY", "MODIFY_ENV")}
    with open(files["PARM"], "wb") as file:
        file.write(parameter_text(conf, outcome.options))
    hook = {
        **outcome.environ,
        "LSB_SUB_PARM_FILE": files["PARM"],
        "LSB_SUB_MODIFY_FILE": files["MODIFY"],
        "LSB_SUB_ABORT_VALUE": str(ABORT),
        "LSF_INVOKE_CMD": invoked_as,  # D
        "LSF_ENVDIR": conf.envdir,
        "LSF_SERVERDIR": conf.serverdir,
    }
    if invoked_as == "bsub":  # not bmod, not brestart (D)
        hook["LSB_SUB_MODIFY_ENVFILE"] = files["MODIFY_ENV"]
    try:
        status, data = spawn.run([path, *arguments], hook, cwd=os.getcwd(), capture=True, stderr=2, own_group=False)
        # Exactly the abort value, or a signal, refuses; every other code is ignored (D/T).
        outcome.refused = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == ABORT
        outcome.ran.append(os.path.basename(path))
        if data:  # the last writer wins (T)
            outcome.data = base64.b64encode(data).decode()
        if not outcome.refused:
            outcome.options |= _modified(files["MODIFY"], lambda name: name in KNOWN)
            outcome.environ |= _modified_environ(files["MODIFY_ENV"])
    finally:
        for name in files.values():
            with suppress(OSError):
                os.unlink(name)


def _temporary() -> str:
    fd, path = tempfile.mkstemp(prefix="lsb.")
    os.close(fd)
    return path


def _modified(path: str, known: object) -> dict[str, str]:
    """Changed options: a bad value or unknown name is a warning and ignored (T); ADDITIONAL cannot be changed (D)."""
    found = {}
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    for line in lines:
        match = _LINE.match(line)
        name = match[1].decode() if match else ""
        if match and callable(known) and known(name):
            found[name] = os.fsdecode(match[2] if match[2] is not None else match[3] or b"")
        elif line.strip():
            print(f"Invalid esub change ignored: {line[:60]!r}", file=sys.stderr)
    return found


def _modified_environ(path: str) -> dict[str, str]:
    with open(path, "rb") as file:
        pairs = re.findall(rb'(?m)^([A-Za-z_][A-Za-z0-9_]*)="(.*)"$', file.read())
    return {name.decode(): os.fsdecode(value) for name, value in pairs}
