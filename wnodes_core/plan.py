"""The plan: everything the keeper needs to raise one lease's VM, decided before it starts.

wnodesd (or, embedded, the launcher) makes it from the admitted request, the job's facts and the
site's settings; the keeper only carries it out. It crosses a socket as JSON.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wnodes_core.errors import LimitExceeded, RequestError
from wnodes_core.model import Boot, Channel, Disk, Filesystem, Image, Job, Mount, Template, Vm, VmRequest
from wnodes_core.ports import Nic, Port

AGENT_PORT = "org.wnodes.agent.0"
QGA_PORT = "org.qemu.guest_agent.0"
MOUNT_PORT = "org.wnodes.mount.{}"

# What QEMU and our helpers need beside the guest's RAM, in MiB, so that the LRMS never ends a
# well-behaved guest for its memory. Measured for TCG: QEMU 7.2 under a guest that touched all of
# its memory takes 141-190 MiB more than that (128 of them its translation buffer; the higher figure
# counts shared libraries), the keeper 55, a launcher 16, a gateway 8; the rest is slack. KVM's is
# that without the buffer, not measured.
OVERHEAD_MIB = {"kvm": 192, "tcg": 320}
DEFAULT_MEMORY_MIB = 1024
DEFAULT_CPUS = 1


@dataclass(frozen=True)
class User:
    """The job's user as the guest must know it; ``groups`` maps names to gids."""

    name: str
    uid: int
    gid: int
    home: str
    groups: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, uid: int, gid: int) -> User:
        """Look the user and all groups up in the system's databases.

        Raises RequestError for an uid without an account.
        """
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            raise RequestError(f"uid {uid} has no account on this node") from None
        gids = dict.fromkeys([gid, *os.getgrouplist(entry.pw_name, gid)])
        return cls(entry.pw_name, uid, gid, entry.pw_dir, {group_name(g): g for g in gids})


def group_name(gid: int) -> str:
    """A group's name, made up for one that has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid{gid}"


@dataclass(frozen=True)
class Plan:
    """One lease's VM, in full. Sizes are the guest's own.

    ``template`` is what the VM is cloned from if that can be done; else it is booted.
    ``port`` is its place in a network; its keeper makes it, unless wnodesd has and ``nic`` says what came of it.
    With ``slot`` it is a clone of the pool's, in that folder; ``fallback`` says what went wrong with one before.
    ``mount_ports`` and ``most_mib`` are given by a template's builder, whose guest has no mounts yet.
    ``storage`` names the providers that may serve mounts, best first; ``exports`` is what wnodesd made for some, by
    the mount's number. ``scratch`` is the lease's own empty disk, if the job is to have one; ``scratch_at`` are the
    guest's folders that lie on it. ``spare_mounts`` is room for mounts of accounts that the job may become;
    ``run_as`` says that the guest may ask for one, be it to be refused with a reason.
    """

    lease: str
    folder: str
    job: Job
    image: Image
    user: User
    accel: str
    cpus: int
    memory_mib: int
    mounts: tuple[Mount, ...]
    boot_timeout_s: float
    console_kib: int = 1024
    host_commands: tuple[str, ...] = ()
    template: Template | None = None
    trace: bool = False
    mount_ports: int = 0
    most_mib: int = 0
    storage: tuple[str, ...] = ("sshfs",)
    scratch: Disk | None = None
    scratch_at: tuple[str, ...] = ()
    port: Port | None = None
    nic: Nic | None = None
    slot: str = ""
    fallback: str = ""
    exports: Mapping[str, Any] = field(default_factory=dict)
    spare_mounts: int = 0
    run_as: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Back from ``to_dict``."""
        return cls(
            **{
                **data,
                "job": Job(**data["job"]),
                "image": Image.from_dict(data["image"]),
                "user": User(**data["user"]),
                "mounts": tuple(Mount(**mount) for mount in data["mounts"]),
                "host_commands": tuple(data["host_commands"]),
                "storage": tuple(data["storage"]),
                "scratch": Disk(**data["scratch"]) if data.get("scratch") else None,
                "scratch_at": tuple(data["scratch_at"]),
                "template": Template.from_dict(data["template"]) if data.get("template") else None,
                "port": Port.from_dict(data["port"]) if data.get("port") else None,
                "nic": Nic.from_dict(data["nic"]) if data.get("nic") else None,
            }
        )

    @property
    def host_name(self) -> str:
        """The guest's host name: unique, legal in DNS, and it says which job it is."""
        return re.sub(r"[^a-z0-9-]+", "-", f"wn-{self.job.job_id}-{self.job.node}".lower()).strip("-")[:63]

    @property
    def overlay(self) -> Disk:
        """The lease's copy-on-write layer on the image, or on its template's disk."""
        path = f"{self.folder}/overlay.qcow2"
        if self.template:
            base, blank = self.template.disks[0], self.template.files.get("blank", "")
            blank = blank and f"{self.template.folder}/{blank}"
            return Disk(path, "qcow2", base.path, base.format, False, "root", base.base, base.base_format, blank)
        return Disk(path, "qcow2", self.image.path, self.image.format, serial="root")

    def with_memory(self, fds: Sequence[int]) -> Plan:
        """With the template's memory where wnodesd has handed it over as an open file."""
        if not (self.template and fds):
            return self
        return replace(self, template=replace(self.template, memory=f"/proc/self/fd/{fds[0]}"))

    @property
    def booted(self) -> Plan:
        """The same VM, booted and not cloned."""
        return replace(self, template=None)

    @property
    def console(self) -> str:
        """The file that receives the guest's serial console."""
        return f"{self.folder}/console.log"

    @property
    def agent_socket(self) -> str:
        """Host side of the agent's port."""
        return f"{self.folder}/agent.sock"

    @property
    def qga_socket(self) -> str:
        """Host side of QEMU's own guest agent, for an image that starts ours through it."""
        return f"{self.folder}/qga.sock"

    @property
    def seed(self) -> Disk:
        """The seed disk, for an image that starts our agent through cloud-init."""
        return Disk(f"{self.folder}/seed.iso", "raw", read_only=True, serial="cidata")

    def mount_socket(self, index: int) -> str:
        """Host side of the port of mount number ``index``."""
        return f"{self.slot or self.folder}/mount{index}.sock"

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The ports of the VM; a template's guest has more for mounts than this job may need."""
        ports = max(self.served_ports, self.template.mount_ports if self.template else self.mount_ports)
        mounts = (Channel(MOUNT_PORT.format(i), self._mount_path(i)) for i in range(ports))
        qga = (Channel(QGA_PORT, self.qga_socket),) if self.image.facts.get("agent") == "qemu-ga" else ()
        return (Channel(AGENT_PORT, self.agent_socket), *mounts, *qga)

    def _mount_path(self, index: int) -> str:
        return self.mount_socket(index) if index < self.served_ports else ""

    @property
    def served_ports(self) -> int:
        """Ports of mounts that have a host side: the mounts' own, then the spare ones."""
        return len(self.mounts) + self.spare_mounts

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The VM's disks as it starts: overlay, seed for cloud-init, scratch; a clone is given its scratch later."""
        if self.template:
            return (self.overlay, *self.template.disks[1:])
        seed = (self.seed,) if self.image.facts.get("agent") == "cloud-init" else ()
        return (self.overlay, *seed, *((self.scratch,) if self.scratch else ()))

    def vm(self, cpuset: Sequence[int]) -> Vm:
        """What the backend is to start, pinned to ``cpuset`` (the job's, known to the keeper only)."""
        return Vm(
            name=f"wnodes-{self.lease}",
            folder=self.folder,
            cpus=self.cpus,
            memory_mib=self.memory_mib,
            accel=self.accel,
            disks=self.disks,
            channels=self.channels,
            boot=self.image.boot or None,
            arch=self.image.arch,
            cpuset=tuple(cpuset),
            console=self.console,
            most_mib=self.template.shape.most_mib if self.template else self.most_mib,
        )


def vm_from_dict(data: Mapping[str, Any]) -> Vm:
    """A Vm back from the journal."""
    boot = data.get("boot")
    return Vm(
        **{
            **data,
            "disks": tuple(Disk(**disk) for disk in data["disks"]),
            "channels": tuple(Channel(**channel) for channel in data["channels"]),
            "cpuset": tuple(data["cpuset"]),
            "boot": Boot(**boot) if boot else None,
            "filesystems": tuple(Filesystem(**each) for each in data.get("filesystems", ())),
        }
    )


def guest_memory_mib(request: VmRequest, job: Job, settings: Any, accel: str) -> int:
    """The guest's RAM: what was asked for or what the job has, less the measured overhead.

    The job's memory is a hard limit of its cgroup, so QEMU itself must fit beside the guest.
    Where the LRMS gave none (``job.memory_mib`` 0) the wish is the guest's own size.

    Raises LimitExceeded if what is left is below the site's minimum.
    """
    if not job.memory_mib:
        return request.memory_mib or DEFAULT_MEMORY_MIB
    overhead = settings.vm.memory_overhead_mib or OVERHEAD_MIB[accel]
    total = min(request.memory_mib or job.memory_mib, job.memory_mib)
    left = total - overhead
    if left < settings.vm.min_memory_mib:
        want = overhead + settings.vm.min_memory_mib
        raise LimitExceeded(
            f"memory {total} MiB leaves {left} MiB for the guest beside {overhead} MiB for the VM itself",
            hint=f"ask the batch system for at least {want} MiB",
        )
    return left


def make(
    request: VmRequest,
    job: Job,
    image: Image,
    settings: Any,
    accel: str,
    *,
    lease: str = "",
    folder: str = "",
    host_commands: Sequence[str] = (),
    template: Template | None = None,
) -> dict[str, Any]:
    """The plan of an admitted request, as JSON values.

    Raises RequestError (memory too small, user unknown).
    """
    return Plan(
        lease=lease,
        folder=folder,
        job=job,
        image=image,
        user=User.of(job.uid, job.gid),
        accel=accel,
        cpus=request.cpus or job.cpus or DEFAULT_CPUS,
        memory_mib=guest_memory_mib(request, job, settings, accel),
        mounts=request.mounts,
        boot_timeout_s=settings.vm.boot_timeout_s,
        console_kib=settings.vm.console_kib,
        host_commands=tuple(host_commands),
        template=template,
        trace=request.trace == "yes",
        storage=request.storage or settings.storage.order,
        scratch=settings.scratch.disk_for(request.scratch_mib, lease, folder),
        scratch_at=settings.scratch.shown_at,
        spare_mounts=request.spare_mounts,
        run_as=any(rule.may_become for rule in settings.policy),
        port=settings.network.port_for(request.network, request.rate_mbit, lease, job.uid),
    ).to_dict()
