"""What LSF's texts say: text in, objects out. No I/O; every user-written word is distrusted.

Formats: IBM's pages on esub and bjobs -o (LSF 10.1), and a GPL descendant of LSF 4.2 as observed.
The parameter file has no escaping there: it is parsed line by line, never given to a shell.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wnodes_core.api import Job, VmRequest, errors

# LSB_SUB_QUEUE, and of later releases LSB_SUB3_APP: the digit says nothing we need.
_LINE = re.compile(r"(?:LSB_)?SUB\d*_([A-Z][A-Z0-9_]*)=(.*)\Z", re.DOTALL)
# Names and arguments of "bsub -a": "wnodes(image=el9,cpus=2) other". A list of one word is an image.
_OURS = re.compile(r"(?:^|\s)wnodes(?:\(([^()]*)\))?(?=\s|\Z)")
# What LSF's own files, which cannot quote, carry unharmed.
_PLAIN = re.compile(r"[A-Za-z0-9 ._:@=,/+~%-]*\Z")
_LONGEST = 4000
_SECTION = re.compile(r"\b(select|order|rusage|span|same|cu|affinity)\[([^\[\]]*)\]")
SCRIPT = "$LSB_JOBFILENAME.shell"  # what bsub < script becomes, before any shell has expanded it
# Options that a VM cannot follow: bsub's letter by the parameter's name.
_HOST_ONLY = {"LOGIN_SHELL": "-L", "CHKPNT_DIR": "-k", "CHKPNT_PERIOD": "-k", "AUTO_RESIZABLE": "-ar"}
RUNNING = frozenset({"RUN", "USUSP", "SSUSP"})


class Site(NamedTuple):
    """What the installed esub says: ``bsub=PID queues=vm,vmlong apps=vmapp slots=yes login=yes``.

    ``login`` lets ``-L`` pass, which BLAH's wrappers have: the start files then run on the host, the job in its VM.
    """

    queues: tuple[str, ...] = ("vm",)
    apps: tuple[str, ...] = ()
    slots: bool = False
    bsub: str = ""
    login: bool = False


class Submission(NamedTuple):
    """A VM job as bsub submits it: its request and what the submission must become."""

    request: VmRequest
    changes: dict[str, str]


def parse_parameters(text: str) -> dict[str, str]:
    """The options of a submission, by their names without ``LSB_SUB_``; of one given twice the first.

    A value may hold quotes, dollar signs and line ends, raw.

    >>> parse_parameters('LSB_SUB_JOB_NAME="a"b$(c)"\\nLSB_SUB_PTY=Y\\nLSB_SUB3_APP="vm"\\n')
    {'JOB_NAME': 'a"b$(c)', 'PTY': 'Y', 'APP': 'vm'}
    """
    found: dict[str, str] = {}
    name, parts = "", [""]
    for line in [*text.split("\n"), "LSB_SUB_="]:
        match = _LINE.match(line)
        if match is None and line != "LSB_SUB_=":
            parts.append(line)
            continue
        if name:
            found.setdefault(name, _unquoted("\n".join(parts)))
        name, parts = (match[1], [match[2]]) if match else ("", [""])
    return found


def _unquoted(text: str) -> str:
    text = text.rstrip("\n")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def request_text(additional: str, arguments: Sequence[str] = ()) -> str | None:
    """The request in the words of ``bsub -a``, or None if wnodes is not among them.

    ``arguments`` are those that LSF passes to ``esub.wnodes`` itself.

    >>> request_text("openmpi wnodes(image=el9,cpus=2)"), request_text("wnodes(el9)"), request_text("docker(x)")
    ('image=el9,cpus=2', 'image=el9', None)

    Raises BadRequest.
    """
    found = _OURS.findall(additional)
    if len(found) > 1:
        raise errors.BadRequest(f"-a {additional[:200]!r}: wnodes stands there {len(found)} times: want it once")
    if not found:
        if re.search(r"(?:^|\s)wnodes\s*\(", additional):
            raise errors.BadRequest(f"-a {additional[:200]!r}: want wnodes(image=NAME,...) with one pair of brackets")
        return None
    words = [word.strip() for word in (found[0] or ",".join(arguments)).split(",")]
    return ",".join(words if "=" in words[0] or not words[0] else [f"image={words[0]}", *words[1:]])


def parse_request(text: str) -> VmRequest:
    """The request; '' leaves all to the site. Raises BadRequest, also for signs that LSF's files cannot carry."""
    if len(text) > _LONGEST:
        raise errors.BadRequest(f"{text[:60]!r}…: {len(text)} signs: want at most {_LONGEST}")
    if not _PLAIN.match(text):
        raise errors.BadRequest(f"{text[:200]!r}: LSF can carry only letters, digits, blanks and . _ : @ = , / + ~ % -")
    return VmRequest.parse(text) if text else VmRequest()


def parse_site(words: Sequence[str]) -> Site:
    """The words that the installed script passes.

    >>> parse_site(["queues=vm,big", "slots=yes"])
    Site(queues=('vm', 'big'), apps=(), slots=True, bsub='', login=False)
    """
    given = dict(word.partition("=")[::2] for word in words)
    queues, apps = (tuple(filter(None, given.get(key, "").split(","))) for key in ("queues", "apps"))
    return Site(queues, apps, given.get("slots") == "yes", given.get("bsub", ""), given.get("login") == "yes")


def submission(parameters: Mapping[str, str], text: str, site: Site, argv: Sequence[str], modify: bool) -> Submission:
    """A VM job's submission, checked; what to change in it unless it is a ``modify`` (bmod).

    ``argv`` is bsub's own. Raises BadRequest.
    """
    for name, option in _HOST_ONLY.items():
        if parameters.get(name) and not (site.login and name == "LOGIN_SHELL"):
            raise errors.BadRequest(f"bsub {option}: a VM cannot follow it: want the job without")
    request = parse_request(text)
    if modify:
        return Submission(request, {})
    changes = _queue(parameters, site)
    wanted = resources(parameters.get("RES_REQ", ""), site.slots, "NUM_PROCESSORS" in parameters)
    if wanted != parameters.get("RES_REQ", ""):
        changes["LSB_SUB_RES_REQ"] = wanted
    command = rewritten(parameters.get("COMMAND_LINE"), argv)
    return Submission(request, changes | ({"LSB_SUB_COMMAND_LINE": command} if command else {}))


def _queue(parameters: Mapping[str, str], site: Site) -> dict[str, str]:
    """Without the starter of a VM queue or profile the job would run on the bare host: refused, or put there."""
    queue, app = parameters.get("QUEUE", ""), parameters.get("APP", "")
    if app in site.apps or queue in site.queues:
        return {}
    if queue or not site.queues:
        wish = " or ".join([*(f"-q {name}" for name in site.queues), *(f"-app {name}" for name in site.apps)])
        raise errors.BadRequest(f"queue {queue!r} gives no VMs: want {wish or 'a site with a VM queue'}")
    return {"LSB_SUB_QUEUE": site.queues[0]}


def resources(asked: str, slots: bool, parallel: bool) -> str:
    """The resource requirement with a free VM slot in it, and on one host if there are several cpus.

    >>> resources("mem>100 rusage[mem=5]", True, False)
    'select[(mem>100) && vmslots>0] rusage[mem=5,vmslots=1]'
    >>> resources("", False, True), resources("{select[a]} || {select[b]}", True, True)
    ('span[hosts=1]', '{select[a]} || {select[b]}')
    """
    if (
        "{" in asked
        or "vmslots" in asked
        or len({m[0] for m in _SECTION.findall(asked)}) != len(_SECTION.findall(asked))
    ):
        return asked  # alternatives and compounds are the user's own affair: the node decides anyway
    parts = dict(_SECTION.findall(asked))
    bare = _SECTION.sub("", asked).strip()
    if bare:
        parts = {"select": bare, **parts}
    if slots:
        chosen = parts.get("select", "")
        parts["select"] = f"({chosen}) && vmslots>0" if chosen else "vmslots>0"
        parts["rusage"] = f"{parts['rusage']},vmslots=1" if parts.get("rusage") else "vmslots=1"
    if parallel:
        parts.setdefault("span", "hosts=1")
    ordered = sorted(parts, key=lambda name: name != "select")
    return " ".join(f"{name}[{parts[name]}]" for name in ordered)


def rewritten(command: str | None, argv: Sequence[str]) -> str:
    """The command in a form that survives ``'%USRCMD'``, or '' if it does as it is.

    Only a command that stands at the end of bsub's own argv is rewritten: a script from stdin arrives
    here flattened, but at the node as a path.

    >>> rewritten("echo 'a b'", ["bsub", "-q", "vm", "echo 'a b'"])
    '--b64 ZWNobyAnYSBiJw=='

    Raises BadRequest if it would break and cannot be rewritten.
    """
    shown = command if command is not None else " ".join(argv[1:])
    if "'" not in shown:
        return ""
    tails = [list(argv[start:]) for start in range(1, len(argv))]
    if command is None:
        hint = "put it into a script, or LSB_SUB_COMMANDNAME=y into lsf.conf"
        raise errors.BadRequest("the command holds a single quote, which this LSF cannot carry", hint=hint)
    if any(" ".join(tail) == command or _split(command) == tail for tail in tails):
        return "--b64 " + base64.b64encode(command.encode(errors="surrogateescape")).decode()
    return ""


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []


def key_of(job_id: Sequence[str], index: Sequence[str]) -> str | None:
    """The job's id here, from all values that its environment has for LSB_JOBID and LSB_JOBINDEX.

    >>> key_of(["12"], ["0"]), key_of(["12"], ["3"]), key_of(["12", "13"], []), key_of(["../x"], [])
    ('12', '12_3', None, None)
    """
    values = [*job_id, *index]
    if len(job_id) != 1 or len(index) > 1 or not all(re.fullmatch(r"\d{1,15}", value) for value in values):
        return None
    return job_id[0] if not index or int(index[0]) == 0 else f"{job_id[0]}_{index[0]}"


def spec_of(key: str) -> str:
    """The same as bjobs wants it.

    >>> spec_of("12_3"), spec_of("12")
    ('12[3]', '12')
    """
    number, _, index = key.partition("_")
    return f"{number}[{index}]" if index else number


def confirmed(job: Job, text: str) -> Job:
    """The job with queue and cpus out of ``bjobs -json -o``, which must show it running here for its user.

    Raises TransientError where it does not (yet), RequestError if it is another's.
    """
    try:
        records: Any = json.loads(text)["RECORDS"]
        record = {str(name).upper(): str(value) for name, value in records[0].items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise errors.TransientError(f"job {job.job_id}: bjobs shows no such job: {text[:200]!r}") from None
    if len(records) != 1 or record.get("JOBID", "").partition("[")[0] != job.job_id.partition("_")[0]:
        raise errors.TransientError(
            f"job {job.job_id}: bjobs shows {len(records)} jobs, {record.get('JOBID')!r}: want it"
        )
    if record.get("USER") != job.user:
        raise errors.RequestError(f"job {job.job_id} is of user {record.get('USER')!r}, not of {job.user!r}")
    cpus = hosts_of(record.get("EXEC_HOST", "")).get(job.node.lower(), 0)
    if record.get("STAT") not in RUNNING or not cpus:
        where = f"{record.get('STAT')} on {record.get('EXEC_HOST')!r}"
        raise errors.TransientError(f"job {job.job_id}: bjobs shows it {where}: want it running on {job.node}")
    return Job(**{**job.to_dict(), "cpus": cpus, "queue": record.get("QUEUE", "")})


def hosts_of(text: str) -> dict[str, int]:
    """Slots by host, short names, out of bjobs' EXEC_HOST.

    >>> hosts_of("4*n1.example.org:N2:n2")
    {'n1': 4, 'n2': 2}
    """
    found: dict[str, int] = {}
    for word in filter(None, text.split(":")):
        count, star, host = word.partition("*")
        host = (host if star else count).split(".")[0].lower()
        found[host] = found.get(host, 0) + (int(count) if star and count.isdecimal() else 1)
    return found


def live_of(text: str) -> frozenset[str]:
    """Ids of unfinished jobs, from lines ``JOBID JOBINDEX``; some releases print ``JOBID[INDEX]``.

    >>> sorted(live_of("12 0\\n13[4] 4\\n")), live_of("No unfinished job found")
    (['12', '13_4'], frozenset())

    Raises TransientError for anything else.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if any(" ".join(line[:2]) in ("No unfinished", "No matching") for line in lines):
        return frozenset()
    keys = [key_of([line[0].partition("[")[0]], [i for i in line[1:2] if i != "-"]) for line in lines]
    if None in keys:
        raise errors.TransientError(f"bjobs prints {text[:200]!r}: want lines of job id and index")
    return frozenset(key for key in keys if key)
