"""LSF adapter: esub, eexec, PRE_EXEC, POST_EXEC and JOB_STARTER in core's words.

Contract (IBM Spectrum LSF 10.1: esub and eexec, pre- and post-execution processing, JOB_STARTER; and
a GPL descendant of LSF 4.2 as observed): every hook runs as the job's user in the job's environment, so
none of them is believed. An esub refuses a job by LSB_SUB_ABORT_VALUE alone; every other code accepts it.
PRE_EXEC: 0 runs the job, 99 ends it for good, anything else sends it back to its queue.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence

from wnodes_core.api import Job, NativeCall, NativeReply, Owner, Phase, Process, VmRequest, environ_of, errors, hookimpl
from wnodes_lsf import native

wnodes_api = 1
REQUEST = "WNODES_REQUEST"  # in the job's environment, put there by esub
EXIT_ABORT_PRE = 99  # LSB_EXIT_PRE_ABORT
EXIT_RETRY = 75  # hooks/lsf/pre_exec makes it 1: that would be a crash of Python's too
_BMOD = ("bmod", "brestart")
_LIVE = 'exec 2>&1; bjobs -u all -m "$1" -noheader -o "jobid jobindex" || :'


@hookimpl
def wnodes_lrms_read(call: NativeCall) -> tuple[VmRequest, Job | None] | None:
    """The parameter file at submission, the job's environment later: the user's own words, all of them."""
    if call.phase is Phase.SUBMIT:
        found = _submission(call)
        return (found.request, None) if found else None
    if call.phase is Phase.PREPARE:
        text = call.environ.get(REQUEST)
        return (native.parse_request(text), None) if text is not None else None
    return VmRequest(), None


def _submission(call: NativeCall) -> native.Submission | None:
    """What this call of esub submits, or None for an ordinary job. The last argv words are LSF's own."""
    try:
        with open(call.environ.get("LSB_SUB_PARM_FILE", ""), encoding="utf-8", errors="surrogateescape") as file:
            parameters = native.parse_parameters(file.read())
    except OSError:
        return None  # lsrun has none
    words = [*call.argv[1:], "--"]  # ours, "--", LSF's own
    ours, theirs = words[: words.index("--")], words[words.index("--") + 1 : -1]
    additional = parameters.get("ADDITIONAL") or call.environ.get("LSB_SUB_ADDITIONAL", "")
    text = native.request_text(additional, [word for word in theirs if not word.startswith("-")])
    if text is None:
        return None
    modify = "MODIFY" in parameters or call.environ.get("LSF_INVOKE_CMD", "") in _BMOD
    site = native.parse_site(ours)
    return native.submission(parameters, text, site, _argv_of(site.bsub), modify)


def _argv_of(pid: str) -> list[str]:
    """bsub's own words; it is the parent of our script."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().split("\0")[:-1]
    except OSError:
        return []


@hookimpl
def wnodes_lrms_reply(call: NativeCall, error: errors.WnodesError | None, job: Job | None) -> NativeReply:
    """The outcome in LSF's terms."""
    del job
    shown = f"wnodes: {error}\n" if error else ""
    if call.phase is Phase.SUBMIT:
        return _refused(call, error) if error else _submitted(call)
    if call.phase is not Phase.PREPARE or error is None:
        return NativeReply(stderr=shown)
    return NativeReply(EXIT_ABORT_PRE if error.verdict is errors.Verdict.HOLD else EXIT_RETRY, stderr=shown)


def _refused(call: NativeCall, error: errors.WnodesError) -> NativeReply:
    abort = call.environ.get("LSB_SUB_ABORT_VALUE", "")
    code = int(abort) if abort.isdecimal() and 0 < int(abort[:4]) < 256 else 97
    return NativeReply(code, stderr=f"wnodes: {error}\n")


def _submitted(call: NativeCall) -> NativeReply:
    try:
        found = _submission(call)
    except errors.WnodesError as error:  # the file has changed since it was read
        return _refused(call, error)
    if found is None or not (found.changes or call.environ.get("LSB_SUB_MODIFY_ENVFILE")):
        return NativeReply()
    line, modify = f'{REQUEST}="{found.request.text()}"\n', "".join(f'{k}="{v}"\n' for k, v in found.changes.items())
    wanted = (("LSB_SUB_MODIFY_ENVFILE", line), ("LSB_SUB_MODIFY_FILE", modify))
    files = tuple((call.environ[name], text) for name, text in wanted if text and call.environ.get(name))
    return NativeReply(stdout=line, files=files)


@hookimpl
def wnodes_lrms_owner(ancestry: Sequence[Process]) -> Owner | None:
    """The job whose tree hangs on the root-run sbatchd: its root process is sbatchd's child.

    Which job that is sbatchd wrote into the environment of what it started. A child that is still
    sbatchd's own image (before the job) has sbatchd's environment: then the next one below tells.
    """
    top = next((i for i, process in enumerate(ancestry) if _is_sbatchd(process)), 0)
    for process in reversed(ancestry[:top]):
        found = [environ_of(process, name) for name in ("LSB_JOBID", "LSB_JOBINDEX")]
        if any(found):
            key = native.key_of(*found)
            folder = (environ_of(process, "LS_SUBCWD") or [""])[0]
            return Owner(key, "job", ancestry[top - 1], True, _node(), folder) if key else None
    return None


def _is_sbatchd(process: Process) -> bool:
    """Whether root runs this, from a file of root's, by LSF's name; the real uid counts, not a set-uid one."""
    if os.path.basename(process.exe) != "sbatchd":
        return False
    try:
        with open(f"/proc/{process.pid}/status", encoding="utf-8", errors="replace") as file:
            uids = next(line for line in file if line.startswith("Uid:")).split()[1:]
        return set(uids) == {"0"} and os.stat(f"/proc/{process.pid}/exe").st_uid == 0
    except (OSError, StopIteration):
        return False


def _node() -> str:
    return os.uname().nodename.split(".")[0]


@hookimpl
def wnodes_lrms_claim(owner: Owner, uid: int, gid: int) -> Job | None:
    """Every hook of LSF is the user's own, so every job claims its VM itself."""
    try:
        user = pwd.getpwuid(uid).pw_name
        return Job("lsf", owner.job_id, owner.node, uid, gid, user, work_dir=owner.work_dir)
    except KeyError:
        return None


@hookimpl
def wnodes_lrms_facts_query(job: Job) -> Sequence[str]:
    """What mbatchd knows of the job: the answer to a job that another's environment names."""
    return ("bjobs", "-json", "-o", "jobid stat user queue exec_host", native.spec_of(job.job_id))


@hookimpl
def wnodes_lrms_facts_parse(job: Job, text: str) -> Job:
    """Confirms user, state and host; fills in queue and cpus."""
    return native.confirmed(job, text)


@hookimpl
def wnodes_lrms_live_query(node: str) -> Sequence[str]:
    """bjobs says that there are no jobs by its exit code or on stderr, as releases differ: both are read."""
    return ("sh", "-c", _LIVE, "bjobs", node)


@hookimpl
def wnodes_lrms_live_parse(text: str) -> frozenset[str]:
    """Job ids with array indices."""
    return native.live_of(text)
