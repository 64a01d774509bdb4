"""What clients' messages say, checked before anything is made of it."""

from __future__ import annotations

import re

from wnodes_core.errors import BadRequest
from wnodes_core.model import Job, VmRequest

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_LRMS = re.compile(r"[a-z][a-z0-9_]{0,15}\Z")


def check_lrms(name: object) -> str:
    """A batch system's name as a client gave it. Raises BadRequest."""
    if not isinstance(name, str) or not _LRMS.match(name):
        raise BadRequest(f"lrms {str(name)[:40]!r}: want a name as in slurm")
    return name


def check_word(role: str, word: object) -> str:
    """A job id or node name that becomes part of a file's name. Raises BadRequest."""
    if not isinstance(word, str) or not _WORD.match(word):
        raise BadRequest(f"{role} {str(word)[:80]!r}: want letters, digits, '.', '_' and '-', at most 64")
    return word


def job_of(data: object, lrms: str) -> Job:
    """The job's facts as root's hook sent them. Raises BadRequest."""
    try:
        job = Job(**data)  # type: ignore[arg-type]
    except TypeError as error:
        raise BadRequest(f"job: {error}") from None
    numbers = (job.uid, job.gid, job.cpus, job.memory_mib)
    if any(type(n) is not int or n < 0 for n in numbers) or job.lrms != lrms:
        raise BadRequest(f"job {job.job_id!r}: want numbers for uid, gid, cpus, memory_mib and lrms {lrms!r}")
    check_word("job id", job.job_id)
    check_word("node", job.node)
    return job


def request_of(data: object) -> VmRequest:
    """The user's request as root's hook sent it. Raises BadRequest."""
    try:
        return VmRequest.from_dict(data)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"request: {error}") from None
