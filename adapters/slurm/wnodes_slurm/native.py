"""What Slurm's texts say: text in, objects out. No I/O; every user-written word is distrusted.

Formats as Slurm 22.05.8 prints them (captured in tests/captured/), documented in prolog_epilog.html,
scontrol(1) and squeue(1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from wnodes_core.api import ImageRef, Job, VmRequest, errors

# "slurmstepd: [12.batch]", "[12.0]"; a component of a het job shows its own id too: "[12+1.0]".
_TITLE = re.compile(r"slurmstepd: \[(?P<job>\d+)(?:\+(?P<het>\d+))?\.(?P<step>\d+|batch|extern|interactive)\]")
# The constraint is an expression over feature names: vm_NAME as a whole word of it.
_FEATURE = re.compile(r"(?:^|[&|,()\[\]])vm_([A-Za-z0-9][A-Za-z0-9._-]*)(?=$|[&|,()\[\]*])")
_SPECIAL = {4294967290: "interactive", 4294967291: "batch", 4294967292: "extern"}  # slurm.h
JOB_LONG = frozenset({"batch", "interactive", "extern"})


def request_from(environ: Mapping[str, str]) -> VmRequest | None:
    """The wish as the Prolog sees it (``SPANK_VM_IMAGE``, ``SPANK_VM_START``, ``SPANK_VM``, a ``vm_NAME`` constraint).

    None without any. An option of its own goes before the same word in ``--vm``.

    >>> request_from({"SLURM_JOB_CONSTRAINTS": "ib&vm_el9"}).image
    'el9'
    >>> request_from({"SPANK_VM": "cpus=2,start=auto", "SPANK_VM_IMAGE": "el9", "SPANK_VM_START": "cold"}).start
    'cold'

    Raises BadRequest.
    """
    image, text, start = (environ.get(f"SPANK_VM{name}", "") for name in ("_IMAGE", "", "_START"))
    named = set(_FEATURE.findall(environ.get("SLURM_JOB_CONSTRAINTS", "")))
    if not (image or text or start or named):
        return None
    request = VmRequest.parse(text) if text else VmRequest()
    if image:
        request = request.merged(VmRequest(image=str(ImageRef.parse(image))))
    if start not in ("", "auto", "warm", "cold"):
        raise errors.BadRequest(f"--vm-start {start[:80]!r}: want auto, warm or cold")
    request = request.merged(VmRequest(start=start))
    if not request.image and named:
        if len(named) > 1:
            raise errors.BadRequest(f"constraint asks for images {', '.join(sorted(named))}: want one vm_NAME")
        request = request.merged(VmRequest(image=named.pop()))
    return request


def job_from(environ: Mapping[str, str]) -> Job:
    """The job's facts as slurmd states them to a Prolog or Epilog (never user text but ``work_dir``).

    Raises WnodesError if slurmd did not say which job this is.
    """
    try:
        job_id, uid, gid = (int(environ[f"SLURM_JOB_{name}"]) for name in ("ID", "UID", "GID"))
        node = environ["SLURMD_NODENAME"]
    except (KeyError, ValueError) as error:
        raise errors.WnodesError(f"not called by slurmd: {error} in the environment") from error
    return Job(
        lrms="slurm",
        job_id=str(job_id),
        node=node,
        uid=uid,
        gid=gid,
        user=environ.get("SLURM_JOB_USER", ""),
        cpus=uniform_cpus(environ.get("SLURM_JOB_CPUS_PER_NODE", "")),
        queue=environ.get("SLURM_JOB_PARTITION", ""),
        account=environ.get("SLURM_JOB_ACCOUNT", ""),
        work_dir=environ.get("SLURM_JOB_WORK_DIR", ""),
    )


def uniform_cpus(text: str) -> int:
    """CPUs on every node of the job, or 0 if its nodes differ (``scontrol`` then tells).

    >>> uniform_cpus("4(x3)"), uniform_cpus("4,2"), uniform_cpus("")
    (4, 0, 0)
    """
    match = re.fullmatch(r"(\d+)(?:\(x\d+\))?", text)
    return int(match[1]) if match else 0


def facts_from(job: Job, text: str) -> Job:
    """The job with cpus and memory of its own node, from ``scontrol -d -o show job``.

    The text mixes Slurm's words with the user's (job name, paths, comment), unescaped. So a part is
    believed only if its marks stand in the line once: Slurm always writes them, a forger adds a second.

    Raises BadRequest if they stand there twice, TransientError if the job or node is not there.
    """
    mine = [line for line in text.splitlines() if line.split(" ", 1)[0] == f"JobId={job.job_id}"]
    if len(mine) != 1:
        raise errors.TransientError(f"job {job.job_id}: scontrol shows it {len(mine)} times: want once")
    block = _between(job, mine[0], " JOB_GRES=", " MinCPUsNode=")
    for part in re.finditer(r" Nodes=(\S+) CPU_IDs=(\S+) Mem=(\d+)", block):
        if job.node in expand(part[1]):
            cpus = sum(1 for _ in indices(part[2]))
            queue = job.queue or _between(job, mine[0], " Partition=", " AllocNode:")
            return Job(**{**job.to_dict(), "cpus": cpus, "memory_mib": int(part[3]), "queue": queue})
    raise errors.TransientError(f"job {job.job_id}: scontrol names no cpus for node {job.node!r}")


def _between(job: Job, line: str, start: str, end: str) -> str:
    if line.count(start) != 1 or line.count(end) != 1:
        raise errors.BadRequest(
            f"job {job.job_id}: its name, paths or comment hold {start.strip()!r} or {end.strip()!r}: want other words"
        )
    return line.partition(start)[2].partition(end)[0]


def indices(text: str) -> Iterator[int]:
    """The numbers of Slurm's ranges.

    >>> list(indices("0-2,7"))
    [0, 1, 2, 7]
    """
    for part in text.split(","):
        low, _, high = part.partition("-")
        yield from range(int(low), int(high or low) + 1)


def expand(hosts: str) -> frozenset[str]:
    """The nodes of a hostlist.

    >>> sorted(expand("n[08-10],gpu1"))
    ['gpu1', 'n08', 'n09', 'n10']
    """
    names: set[str] = set()
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([\d,-]+)\])?([^,\[]*)", hosts):
        parts = [part.partition("-") for part in ranges.split(",")] if ranges else []
        names |= {
            f"{prefix}{number:0{len(low)}d}{suffix}"
            for low, _, high in parts
            for number in range(int(low), int(high or low) + 1)
        } or {prefix + suffix}
    return frozenset(names)


def step_of(command: tuple[str, ...]) -> tuple[str, str] | None:
    """Job id and step name of a slurmstepd's title, or None.

    >>> step_of(("slurmstepd: [12.batch]", ""))
    ('12', 'batch')
    """
    match = _TITLE.match(command[0]) if command else None
    return (match["job"], match["step"]) if match else None


def node_of(socket_path: str, job_id: str) -> str | None:
    """Node name in the path of a slurmstepd's socket, ``SPOOL/NODE_JOB.STEP``, or None.

    >>> node_of("/var/spool/slurmd/n0_12.4294967291", "12")
    'n0'
    """
    match = re.search(rf"/([^/]+)_{re.escape(job_id)}\.\d+(?:\.\d+)?\Z", socket_path)
    return match[1] if match else None


def sockets_of(text: str, inodes: frozenset[str]) -> list[str]:
    """Paths of the sockets with these inodes in a ``/proc/PID/net/unix``."""
    rows = (line.split(None, 7) for line in text.splitlines()[1:])
    return [row[7] for row in rows if len(row) == 8 and row[6] in inodes]


def features_of(text: str) -> list[str] | None:
    """The features in ``scontrol -o show node``, or None if the text is no node.

    >>> features_of("NodeName=n0 AvailableFeatures=ib,vm ActiveFeatures=ib")
    ['ib', 'vm']
    """
    match = re.match(r"NodeName=.*? AvailableFeatures=(\S+) ", text)
    if not match:
        return None
    return [] if match[1] == "(null)" else match[1].split(",")


def one_line(text: str, limit: int = 400) -> str:
    """Text fit for one argument of scontrol: one line, no control characters, bounded.

    >>> one_line("image 'x'\\n  hint: y")
    "image 'x' hint: y"
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]
