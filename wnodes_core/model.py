"""The nouns of the system: job, image, VM, template, lease; the request's are in request.py, the trace's in trace.py.

Frozen, typed, no I/O. Units stand in the names (``memory_mib``, ``timeout_s``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wnodes_core.phases import Phase
from wnodes_core.request import ImageRef, Mount, VmRequest, parse_size_mib
from wnodes_core.trace import Start, Step, Trace

__all__ = [
    "Boot",
    "Channel",
    "Disk",
    "Filesystem",
    "Image",
    "ImageRef",
    "Job",
    "Mount",
    "NativeCall",
    "NativeReply",
    "Owner",
    "Process",
    "Shape",
    "Start",
    "Step",
    "Template",
    "Trace",
    "Vm",
    "VmRequest",
    "parse_size_mib",
]


@dataclass(frozen=True)
class Job:
    """The LRMS's own facts on one job on one worker node; never the job's own words.

    ``key`` is unique on this machine for as long as the job lives (LRMS, node, job id).
    ``cpus`` and ``memory_mib`` are what the LRMS gave the job on this node; 0 = not known.
    """

    lrms: str
    job_id: str
    node: str
    uid: int
    gid: int
    user: str
    cpus: int = 0
    memory_mib: int = 0
    queue: str = ""
    account: str = ""
    work_dir: str = ""

    @property
    def key(self) -> str:
        """File-name-safe identity of the job on this machine."""
        return f"{self.lrms}-{self.node}-{self.job_id}"

    @property
    def marker(self) -> str:
        """Name of the file that makes the job a VM job on this node: its id, without dots, ends at the first one."""
        return f"{self.job_id.replace('.', '_')}.{self.node}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Boot:
    """How an image starts without a boot loader: files in the store, kernel command line."""

    kernel: str
    initrd: str = ""
    cmdline: str = ""


@dataclass(frozen=True)
class Image:
    """An image that lies verified in a store on this node.

    ``digest`` is ``sha256:HEX`` of the disk; ``path`` is read-only for us and for the guest.
    ``facts`` are guest facts from the catalogue (``os``, ``agent``: how our agent is started
    there - ``builtin``, ``cloud-init`` or ``qemu-ga``).
    """

    name: str
    tag: str
    digest: str
    path: str
    format: str  # qcow2 or raw
    arch: str = "x86_64"
    boot: Boot | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Image:
        """Back from ``dataclasses.asdict``."""
        boot = data.get("boot")
        return cls(**{**data, "boot": Boot(**boot) if boot else None})


@dataclass(frozen=True)
class Channel:
    """A virtio-serial port: ``name`` in the guest, Unix socket ``path`` on the host."""

    name: str
    path: str


@dataclass(frozen=True)
class Disk:
    """A block device of the VM; ``path`` is the overlay or a file made for this lease.

    ``base`` is what an overlay lies on. The overlay of a clone lies on its template's disk, which
    is an overlay itself: ``under`` is the image below that. ``blank`` is an empty overlay for that
    template's disk, to be copied: the same for all its clones. A disk without a base is made empty,
    of ``size_mib``. ``block``: the path is a device node, and whatever it names is there already.
    """

    path: str
    format: str
    base: str = ""
    base_format: str = ""
    read_only: bool = False
    serial: str = ""
    under: str = ""
    under_format: str = ""
    blank: str = ""
    size_mib: int = 0
    block: bool = False


@dataclass(frozen=True)
class Filesystem:
    """A host folder that is a device of the VM, from its start on or plugged into a clone.

    ``kind`` is ``virtiofs`` (``source`` is the socket at which its server listens; a booted guest's memory is
    shared with it) or ``9p`` (``source`` is the folder, which the hypervisor itself serves). The guest
    mounts it by its ``tag``.
    """

    kind: str
    source: str
    tag: str
    read_only: bool = False


@dataclass(frozen=True)
class Vm:
    """What a backend starts. ``folder`` belongs to the lease and to the job's uid.

    ``name`` is unique on the machine and is found again in QEMU's own argv, which is how an
    undo after a crash knows its process. ``cpuset`` empty = no pinning. ``console`` receives
    the guest's serial console, bounded by whoever reads it. A channel whose path is '' has nobody
    at its host side. ``most_mib`` is up to where the guest's memory can grow, 0 = not at all.
    """

    name: str
    folder: str
    cpus: int
    memory_mib: int
    accel: str  # kvm or tcg
    disks: tuple[Disk, ...]
    channels: tuple[Channel, ...] = ()
    boot: Boot | None = None
    arch: str = "x86_64"
    cpuset: tuple[int, ...] = ()
    console: str = ""
    most_mib: int = 0
    filesystems: tuple[Filesystem, ...] = ()


@dataclass(frozen=True)
class Shape:
    """A machine that a guest was booted on. ``most_mib`` as in ``Vm``."""

    cpus: int
    memory_mib: int
    most_mib: int = 0

    def fits(self, cpus: int, memory_mib: int) -> bool:
        """Whether a clone of such a guest can have exactly this.

        >>> Shape(1, 512, 4096).fits(1, 2000), Shape(1, 512).fits(1, 600), Shape(2, 512).fits(1, 512)
        (True, False, False)
        """
        return cpus == self.cpus and self.memory_mib <= memory_mib <= max(self.memory_mib, self.most_mib)


@dataclass(frozen=True)
class Template:
    """A guest that was booted once, brought to rest and saved; VMs are cloned from it, copy-on-write.

    ``way`` is how: ``mapped`` (its memory is a file that each clone maps privately) or ``saved``
    (the hypervisor's own save image, read anew by each clone). ``image`` is the image's digest.
    ``memory`` is the path of the memory: a file, or ``/proc/self/fd/N`` in a process that was
    handed it open. ``disks`` are the guest's as it was saved, ``files`` what else the backend
    wrote (by name, relative to ``folder``). ``mount_ports`` is how many mounts a clone can have.
    ``identity`` is what the saved guest said it is: no clone may say the same.
    """

    id: str
    folder: str
    way: str
    image: str
    accel: str
    shape: Shape
    memory: str
    disks: tuple[Disk, ...]
    files: Mapping[str, str]
    mount_ports: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Template:
        """Back from ``dataclasses.asdict``."""
        disks = tuple(Disk(**disk) for disk in data["disks"])
        return cls(**{**data, "shape": Shape(**data["shape"]), "disks": disks})


@dataclass(frozen=True)
class NativeCall:
    """One call of a hook by its LRMS, as it came: nothing parsed, nothing trusted."""

    phase: Phase
    argv: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""


@dataclass(frozen=True)
class NativeReply:
    """What the hook says back in its LRMS's own terms.

    ``commands`` are argv lists run in order after the reply is decided, each tolerant of
    failure (they tell users and operators; nothing depends on them). ``files`` are pairs of path and
    text to append, for an LRMS whose answers are files; never written by root.
    """

    exit_code: int = 0
    stdout: str = ""
    stderr: str = ""
    commands: tuple[tuple[str, ...], ...] = ()
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Process:
    """One line of the process table; ``started`` is the kernel's clock tick of its birth."""

    pid: int
    parent: int
    uid: int
    started: int
    exe: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Owner:
    """The job that a process belongs to, told from its ancestry to the LRMS daemon.

    ``root`` is the job's root process on this node (its end ends the lease).
    ``job_long`` says that the step lives as long as the job does on this node, so the VM may
    live inside it. ``step`` is the LRMS's name of the step. ``work_dir`` is the job's folder, where the
    LRMS wrote it beside the job's id; its user could have written it too. ``last``: once ``root`` has
    ended, no process of this job starts on this node any more, so all of its lease can go.
    """

    job_id: str
    step: str
    root: Process
    job_long: bool
    node: str = ""
    work_dir: str = ""
    last: bool = False
