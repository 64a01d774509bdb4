"""A lease, as wnodesd remembers it: in memory, and line by line in its root-owned journal.

The journal alone is enough to go on after a crash: the record of the resource ``lease`` carries
every fact, and each resource that root made for the lease (folder, marker, cgroup, use of the
image, the keeper) is in it before it exists.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from wnodes_core.agent.protocol import Connection, Peer
from wnodes_core.agent.timing import Timing
from wnodes_core.files import private_folder, sync_folder, write_atomic
from wnodes_core.journal import Journal, Resource
from wnodes_core.model import Image, Job, Owner, Process, VmRequest

ID_MAX = 32  # the lease's sockets must stay below 108 bytes (unix(7))


class State(StrEnum):
    """Where in its life a lease is."""

    PREPARING = "preparing"  # folder and marker are being made; a crash here undoes them
    PREPARED = "prepared"  # no VM yet; the image may still be on its way
    STARTING = "starting"  # one launcher is elected to start the keeper
    RUNNING = "running"  # a keeper holds it
    ENDING = "ending"  # being undone
    OVER = "over"  # undone; only the marker stays, until the job is over, so that no task runs bare


@dataclass
class Lease:
    """One job's claim on one VM on this node."""

    id: str
    job: Job
    request: VmRequest
    folder: str
    marker: str
    journal: Journal
    record: Resource
    state: State = State.PREPARING
    created: float = 0.0  # time.time()
    home: str = ""
    owner: Owner | None = None
    token_hash: str = ""
    keeper: Process | None = None
    starter: Process | None = None
    root: Process | None = None  # lives as long as the job; its end is the lease's
    reason: str = ""
    error: dict[str, Any] | None = None
    boot_id: str = ""
    timing: Timing = field(default_factory=Timing)
    accounts: dict[str, int] = field(default_factory=dict)  # uids of those that its job has become, by name
    # From here on: this process's memory only.
    keeper_state: str = ""
    ran: bool = False  # its keeper has said once that the VM runs
    image: Image | None = None
    no_pool: str = ""  # the kind of error that cost it a slot of the pool: it gets no other
    no_clone: str = ""  # the kind of error that cost it a clone which it could have had
    holding: int = 0  # claims of keepers that are being carried out
    template: str = ""  # the one it was given to clone, held open for it
    fetch: asyncio.Task[Image] | None = None
    progress: str = ""
    connection: Connection | None = None
    job_over: bool = False
    ending: asyncio.Task[None] | None = None
    tries: int = 0
    retry_at: float = 0.0
    misses: int = 0  # sweeps in a row in which the batch system did not know the job
    watches: dict[str, int] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def facts(self) -> dict[str, Any]:
        """What the journal keeps: enough to go on after a crash. The token itself is not in it."""
        return {
            "job": self.job.to_dict(),
            "request": self.request.to_dict(),
            "folder": self.folder,
            "marker": self.marker,
            "state": str(self.state),
            "created": self.created,
            "home": self.home,
            "owner": asdict(self.owner) if self.owner else None,
            "token_sha256": self.token_hash,
            "keeper": asdict(self.keeper) if self.keeper else None,
            "starter": asdict(self.starter) if self.starter else None,
            "root": asdict(self.root) if self.root else None,
            "reason": self.reason,
            "error": self.error,
            "boot_id": self.boot_id,
            "trace": self.timing.facts(),
            "accounts": self.accounts,
        }

    def save(self) -> None:
        """Write the facts to the journal; blocks for one fsync."""
        self.record = self.journal.made(self.record, **self.facts())

    def shown(self) -> dict[str, Any]:
        """As ``wnodes lease list`` and observers see it."""
        return {
            "id": self.id,
            "lrms": self.job.lrms,
            "job_id": self.job.job_id,
            "node": self.job.node,
            "user": self.job.user,
            "uid": self.job.uid,
            "image": self.request.image,
            "state": str(self.state),
            "keeper_state": self.keeper_state,
            "folder": self.folder,
            "home": self.home,
            "since": self.created,
            **self.timing.shown(),
            "accounts": self.accounts,
            "reason": self.reason,
            "error": self.error,
            "keeper_pid": self.keeper.pid if self.keeper else 0,
            "undo_tries": self.tries,
        }

    def notify(self) -> None:
        """Wake everybody who waits for this lease to change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def changed(self) -> Coroutine[Any, Any, object]:
        """Returns, when awaited, at the first ``notify`` after this call (and not after its first step)."""
        return self._changed.wait()

    def new_token(self) -> str:
        """A fresh secret for the next keeper; an earlier one is void from now on."""
        token = secrets.token_hex(32)
        self.token_hash = _digest(token)
        return token

    def token_fits(self, token: object) -> bool:
        """Whether this is the secret given to the launcher that was elected last."""
        fits = hmac.compare_digest(self.token_hash, _digest(str(token)))
        return bool(self.token_hash) and isinstance(token, str) and fits


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def boot_id() -> str:
    """The kernel's name for this boot: pids of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_id(job: Job) -> str:
    """A short, unique, file-name-safe id that still shows the job."""
    return f"{job.key[: ID_MAX - 7].strip('.-_')}-{secrets.token_hex(3)}"


def folders(state_dir: str, run_dir: str) -> None:
    """Make (or accept) the daemon's own folders with the modes that identity relies on."""
    modes = {run_dir: 0o755, state_dir: 0o711, f"{state_dir}/leases": 0o711, f"{state_dir}/journal": 0o700}
    for path, mode in modes.items():
        os.makedirs(path, exist_ok=True)
        os.chmod(path, mode)


_marker_lock = threading.Lock()


def create(job: Job, request: VmRequest, state_dir: str, run_dir: str, journal_type: type[Journal]) -> Lease:
    """Make a lease: journal first, then its folder, then the marker that makes the job a VM job here.

    Blocks for a few fsyncs. Raises StateDirFull, HostError.
    """
    lease_id = new_id(job)
    journal = journal_type(f"{state_dir}/journal/{lease_id}.jsonl")
    lease = Lease(
        id=lease_id,
        job=job,
        request=request,
        folder=f"{state_dir}/leases/{lease_id}",
        marker=f"{run_dir}/{job.lrms}/{job.marker}",
        journal=journal,
        record=Resource("lease", lease_id),
        created=time.time(),
        boot_id=boot_id(),
    )
    lease.record = journal.making("lease", lease_id, **lease.facts())
    with journal.making_it("folder", lease.folder):
        private_folder(lease.folder, uid=job.uid, gid=job.gid)
        sync_folder(os.path.dirname(lease.folder))
    with journal.making_it("marker", lease.marker), _marker_lock:
        os.makedirs(os.path.dirname(lease.marker), mode=0o755, exist_ok=True)
        write_atomic(lease.marker, lease_id.encode() + b"\n", mode=0o644)
    lease.state = State.PREPARED
    lease.save()
    return lease


def remove_marker(lease: Lease) -> None:
    """Remove the lease's marker; a later lease's marker of the same job id stays."""
    path = Path(lease.marker)
    with _marker_lock:
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):  # of a wnodesd that was killed as it wrote it
            half.unlink()
        with suppress(FileNotFoundError):
            if path.read_text().strip() == lease.id:
                path.unlink()


def load(path: Path, journal_type: type[Journal]) -> Lease | None:
    """The lease of a journal found at start; None if nothing of it was ever made (the file is removed)."""
    journal = journal_type(path)
    record = next((r for r in journal.open_resources if r.kind == "lease"), None)
    if record is None:
        journal.close()
        path.unlink()
        return None
    data = dict(record.data)
    return Lease(
        id=record.name,
        job=Job(**data["job"]),
        request=VmRequest.from_dict(data["request"]),
        folder=data["folder"],
        marker=data["marker"],
        journal=journal,
        record=record,
        state=State(data["state"]),
        created=data["created"],
        home=data["home"],
        owner=_owner(data["owner"]),
        token_hash=data["token_sha256"],
        keeper=_process(data["keeper"]),
        starter=_process(data["starter"]),
        root=_process(data["root"]),
        reason=data["reason"],
        error=data["error"],
        boot_id=data["boot_id"],
        timing=Timing.from_facts(data["trace"]),
        accounts=data.get("accounts", {}),
    )


def _process(data: dict[str, Any] | None) -> Process | None:
    return Process(**{**data, "command": tuple(data["command"])}) if data else None


def _owner(data: dict[str, Any] | None) -> Owner | None:
    return Owner(**{**data, "root": _process(data["root"])}) if data else None


def process_of(peer: Peer) -> Process:
    """A peer as the journal keeps it."""
    from wnodes_core import processes

    return processes.read(peer.pid, command_of_users=False) or Process(peer.pid, 0, peer.uid, 0, "", ())
