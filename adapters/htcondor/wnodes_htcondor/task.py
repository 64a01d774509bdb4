"""What the launcher must know of an HTCondor job. No imports but light ones.

Contract (HTCondor 23.9, 25): ``RUNTIME -s exec OPTIONS IMAGE COMMAND ARG…`` as the job's user, in the
working folder, with the job's stdin, stdout and stderr; each variable of the job's also stands in the
environment under ``SINGULARITYENV_``. How the run is to end is told through the job's ad: attributes
``Chirp*`` may be set by ``condor_chirp``, and the expressions that install.py's submit side gives every
VM job hold or requeue it by them. They name the run that they are meant for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from wnodes_core import errors
from wnodes_core.errors import BadRequest, WnodesError
from wnodes_htcondor import native

ENTER = "--"  # enter.py: a command for the VM that the job has already
GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# HoldReasonSubCode of a held job (HoldReasonCode is HTCondor's 3, "JobPolicy"); in README.md.
SUB_CODES: tuple[tuple[type[WnodesError], int], ...] = (
    (errors.RequestError, 101),  # the user asked for what cannot be had
    (errors.ImageError, 102),  # the image is wrong
    (errors.SettingsError, 103),  # the site is
    (errors.PluginError, 103),
    (errors.FailedAgain, 104),  # what was to be better the second time, and was not
    (errors.TransientError, 104),  # the same over two nodes; or the job's own code had begun
    (errors.HostError, 105),  # the node is sick
    (WnodesError, 106),  # whatever else
)


class Task(NamedTuple):
    """One job: its argv and environment, and the VM it asks for."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    carried: tuple[str, ...]
    host_commands: tuple[str, ...]
    leader_signals: frozenset[int]
    request: str | None


def read_task(argv: tuple[str, ...], environ: Mapping[str, str]) -> Task:
    """The command that HTCondor means to run, and the request in the job's ad.

    Raises BadRequest.
    """
    chirp = (environ["WNODES_CHIRP"],) if environ.get("WNODES_CHIRP") else ()  # the guest's, too
    if argv[1:2] == (ENTER,):
        kept = {name: environ[name] for name in ("TERM", "LANG") if name in environ}
        return Task(argv[2:], {"PATH": GUEST_PATH, **kept}, (), chirp, frozenset(), None)
    call = native.runtime_call(argv[1:])
    if not call.command:
        raise BadRequest(f"runtime called with {' '.join(argv[1:])[:200]!r}: want exec OPTIONS IMAGE COMMAND")
    own = native.guest_environment(environ)
    home = call.option("--home", "-H").partition(":")[0]
    request = native.request_from(job_ad(environ))
    if request is None:
        raise BadRequest("the job's ad asks for no VM: want vm_image = NAME")
    defaults = {"PATH": GUEST_PATH, **({"HOME": home} if home else {})}
    return Task(call.command, {**defaults, **own}, (), chirp, frozenset(), request.text())


def job_ad(environ: Mapping[str, str]) -> dict[str, native.Value]:
    """The job's own ad. Raises BadRequest."""
    path = environ.get("_CONDOR_JOB_AD") or os.path.join(environ.get("_CONDOR_SCRATCH_DIR", "."), ".job.ad")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return native.parse_ad(file.read(native.MAX_AD))
    except OSError as error:
        raise BadRequest(f"job ad {path!r}: {error.strerror}: want the starter's") from error


def refusal(error: WnodesError, environ: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """What tells HTCondor that this run came to nothing: hold the job with our words, or run it once more.

    wnodesd bounds a requeue on its own node; over nodes it is bounded by the job's ad, which keeps that
    there was one. Without condor_chirp the exit code and stderr must do.
    """
    chirp = environ.get("WNODES_CHIRP", "")
    try:
        ad = job_ad(environ)
    except BadRequest:
        ad = {}
    if not chirp:
        return ()
    facts = {"ChirpWnodesRun": str(native.number_of(ad, "NumShadowStarts"))}
    text = native.quoted(f"wnodes: {error}")
    if error.again and "chirpwnodesagain" not in ad:
        # What an earlier run said of a hold is none of this one's.
        facts |= {"ChirpWnodesAgain": text, "ChirpWnodesHold": "undefined"}
    else:
        facts["ChirpWnodesHold"] = text
        facts["ChirpWnodesCode"] = str(next(code for kind, code in SUB_CODES if isinstance(error, kind)))
    return tuple((chirp, "set_job_attr_delayed", name, value) for name, value in facts.items())
