"""The settings as frozen dataclasses. They are the schema: keys, types, defaults, words of help.

A key in YAML is the name of the field. Numbers are in the unit that the name ends in; a word
with a unit of its own (``8G``, ``30m``, ``90%``) is understood as well. A new field here is at
once known to the loader, ``wnodes config``, docs/settings.md and docs/wnodes.yaml.example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wnodes_core.settings import values
from wnodes_core.settings.fields import section, setting
from wnodes_core.settings.network import NetworkSettings
from wnodes_core.settings.scratch import ScratchSettings

SITE_FOLDER = "/etc/wnodes"
_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class PurgeSettings:
    """When images that nobody uses are removed from the node."""

    max_age_days: int = setting(30, "Remove an image unused for so long; 0 = never.", values.duration("d", 0))
    high_percent: int = setting(90, "Start removing when the file system is filled beyond this.", values.percent)
    low_percent: int = setting(80, "Then remove, least recently used first, until it is filled less.", values.percent)

    def __post_init__(self) -> None:
        if self.low_percent > self.high_percent:
            raise ValueError(f"low_percent {self.low_percent} exceeds high_percent {self.high_percent}")


@dataclass(frozen=True)
class ImageSettings:
    """The image store of this node."""

    folder: str = setting(
        "", "The store. Default: STATE_DIR/images.", values.folder, node_only=True, example="/var/lib/wnodes/images"
    )
    fetch_timeout_s: int = setting(1800, "Give up fetching an image after so long.", values.duration("s"))
    purge: PurgeSettings = section(PurgeSettings, "Automatic removal of images; one in use is never removed.")


@dataclass(frozen=True)
class Rule:
    """One rule of the policy. It matches when each list that is given names the job's.

    All rules that match are put together in order: of single values the later one wins, lists
    add up. An ``images`` or ``allow_mounts`` that no matching rule gives leaves everything allowed; an
    empty list, nothing. The job's working folder is mounted whatever ``allow_mounts`` says, and
    every mount is served with the user's own rights.
    """

    users: tuple[str, ...] = setting(
        (), "User names or patterns (`*`, `?`, `[]`); empty = everybody.", example=["ann", "atlas*"]
    )
    groups: tuple[str, ...] = setting(
        (), "Groups or patterns; the user is in one of them; empty = all.", example=["physics"]
    )
    queues: tuple[str, ...] = setting((), "Queues or partitions, or patterns; empty = all.", example=["long"])
    accounts: tuple[str, ...] = setting(
        (), "Accounts, projects or virtual organisations, or patterns; empty = all.", example=["proj1"]
    )
    images: tuple[str, ...] | None = setting(
        None, "Images allowed: NAME (any tag) or NAME:TAG, or patterns.", example=["debian12", "el9:2026.*"]
    )
    default_image: str = setting("", "The image for a request that names none.", example="debian12")
    mounts: tuple[str, ...] = setting(
        (),
        "Mounts that every VM gets: SRC[:DST][:ro]; `~` is the user's home, `{user}` the name.",
        values.mount,
        example=["/cvmfs:/cvmfs:ro", "~"],
    )
    allow_mounts: tuple[str, ...] | None = setting(
        None,
        "Host folders that users may ask to mount, with all below them; `~` and `{user}` as above.",
        values.place,
        example=["~", "/data/{user}"],
    )
    storage: tuple[str, ...] = setting(
        (), "Storage providers for these jobs' mounts, best first, in place of storage.order.", example=["virtiofs"]
    )
    networks: tuple[str, ...] | None = setting(
        None, "Networks allowed, or patterns. Not given: none and user only.", example=["user", "cms-*"]
    )
    default_network: str = setting("", "The network for a request that names none.", example="cms-lan")
    may_become: tuple[str, ...] = setting(
        (),
        "Accounts, or @GROUP, as which these jobs may run commands in their VM (`wnodes-run-as`); never a system's.",
        values.account,
        example=["alice", "@payload"],
    )
    become_ports: int = setting(
        0, "How many mounts those accounts may have in one VM together; 0 = 4.", values.whole, example=2
    )
    max_cpus: int = setting(0, "The most cpus a VM may have; 0 = as many as the job.", values.whole, example=16)
    default_scratch_mib: int = setting(
        0, "Scratch disk of a VM whose request names none; 0 = none.", values.size("m"), example="10G"
    )
    max_scratch_mib: int = setting(
        0, "The most scratch disk a VM may have; 0 = what the node has room for.", values.size("m"), example="100G"
    )
    max_memory_mib: int = setting(
        0, "The most memory a VM may have; 0 = as much as the job.", values.size("m"), example="64G"
    )


@dataclass(frozen=True)
class VmSettings:
    """How VMs are made on this node."""

    boot_timeout_s: int = setting(180, "A guest that has not answered by then is given up.", values.duration("s"))
    memory_overhead_mib: int = setting(
        0, "Kept back from the job's memory for QEMU itself; 0 = measured default.", values.size("m")
    )
    min_memory_mib: int = setting(128, "A VM with less memory is refused.", values.size("m"))
    console_kib: int = setting(1024, "How much of the serial console is kept with the lease.", values.size("k"))


@dataclass(frozen=True)
class PoolRule:
    """So many clones of one image are kept restored, idle, until a job takes one."""

    image: str = setting("", "The image: NAME or NAME:TAG.", example="debian12")
    count: int = setting(1, "How many clones wait.", values.whole)
    cpus: int = setting(1, "Virtual cpus of each; a job that has another number gets none of them.", values.whole)


@dataclass(frozen=True)
class WarmSettings:
    """Warm start: VMs that are cloned from a booted guest instead of being booted."""

    build: str = setting(
        "on_use",
        "When a node makes templates: on_use (after an image's first cold start), pool (for its images), or never.",
        values.choice("on_use", "pool", "never"),
        node_only=True,
    )
    folder: str = setting(
        "",
        "Where templates lie: a local file system, or a tmpfs. Default: STATE_DIR/templates.",
        values.folder,
        node_only=True,
        example="/var/lib/wnodes/templates",
    )
    max_templates: int = setting(8, "The most templates kept; the least recently used goes first.", values.whole)
    max_mib: int = setting(16384, "The most room that they take together.", values.size("m"))
    base_memory_mib: int = setting(
        512, "Memory that a template is booted with; clones grow from there to what their job has.", values.size("m")
    )
    way: str = setting(
        "auto",
        "mapped (memory is mapped copy-on-write), saved (libvirt's save image), or auto: the first that works here.",
        values.choice("auto", "mapped", "saved"),
    )
    build_user: str = setting("nobody", "The account that boots a guest to save it.", node_only=True)
    pool: tuple[PoolRule, ...] = setting((), "Clones that wait for jobs; none by default.", node_only=True)
    pool_uids: str = setting(
        "none",
        "Uids that nobody has, as in 90000-90063: each clone of the pool runs under one of its own until its job is "
        "over. Without them there is no pool. Not of 61184-65519, which systemd gives away.",
        values.numbers_text,
        node_only=True,
    )
    pool_min_free_mib: int = setting(
        2048, "The pool shrinks while the node has less memory free than this.", values.size("m"), node_only=True
    )


@dataclass(frozen=True)
class StorageSettings:
    """How mounts reach the guest."""

    order: tuple[str, ...] = setting(
        ("sshfs",),
        "Providers of mounts, best first: the first that host and guest can do serves. `wnodes doctor` names them.",
        example=["sshfs"],
    )

    def __post_init__(self) -> None:
        if not self.order:
            raise ValueError("order is empty: no mount could be served")


@dataclass(frozen=True)
class DaemonSettings:
    """wnodesd on this node."""

    socket: str = setting(
        "", "Where it listens. Default: RUN_DIR/wnodesd.sock.", values.socket_path, example="/run/wnodes/wnodesd.sock"
    )
    metrics: str = setting(
        "",
        "Prometheus: unix:/PATH or 127.0.0.1:PORT. Default: unix:RUN_DIR/metrics.sock.",
        values.metrics_address,
        example="127.0.0.1:9752",
    )
    slots: int = setting(
        0, "How many VMs the node takes at once, as RUN_DIR/capacity tells batch systems; 0 = its cpus.", values.whole
    )
    sweep_interval_s: int = setting(30, "How often it looks for leases whose job is gone.", values.duration("s"))
    log_level: str = setting("info", "How much it logs: debug, info, warning or error.", values.choice(*_LEVELS))


@dataclass(frozen=True)
class PluginSettings:
    """Which plug-ins are left out."""

    disabled: tuple[str, ...] = setting((), "Names (as `wnodes plugins` shows them) not to load.")


class Derived(str):
    """A default that was made from another value, and follows it through ``replace``."""


@dataclass(frozen=True)
class Settings:
    """All settings of one node (or, embedded, of one user)."""

    state_dir: str = setting(
        "/var/lib/wnodes", "Leases, journals and images: a local file system with room.", values.folder, node_only=True
    )
    run_dir: str = setting("/run/wnodes", "Sockets of wnodesd; a tmpfs.", values.folder)
    accel: str = setting(
        "auto",
        "kvm (a node where it does not run is an error), tcg (emulation), or auto: kvm where it is proved to run.",
        values.choice("auto", "kvm", "tcg"),
    )
    images: ImageSettings = section(ImageSettings, "The image store.")
    policy: tuple[Rule, ...] = setting((), "Who may have what. Rules of later files follow those of earlier ones.")
    vm: VmSettings = section(VmSettings, "How VMs are made.")
    warm: WarmSettings = section(WarmSettings, "Templates, clones of them, and the pool of idle clones.")
    storage: StorageSettings = section(StorageSettings, "How mounts reach the guest.")
    scratch: ScratchSettings = section(ScratchSettings, "Scratch disks.")
    network: NetworkSettings = section(NetworkSettings, "Networks that VMs of this node may be in.")
    daemon: DaemonSettings = section(DaemonSettings, "wnodesd.")
    plugins: PluginSettings = section(PluginSettings, "Plug-ins.")
    lrms: Mapping[str, Mapping[str, Any]] = setting(
        {}, "One section an adapter, by its name; its own page says what is in it.", example={"slurm": {}}
    )

    # Not keys: where it all came from. ``origins``: "images.folder" -> "FILE:LINE".
    sources: tuple[str, ...] = field(default=(), compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._derive("images", folder=f"{self.state_dir}/images")
        self._derive("warm", folder=f"{self.state_dir}/templates")
        self._derive("daemon", socket=f"{self.run_dir}/wnodesd.sock", metrics=f"unix:{self.run_dir}/metrics.sock")

    def _derive(self, name: str, **defaults: str) -> None:
        old = getattr(self, name)
        unset = {
            k: Derived(v) for k, v in defaults.items() if isinstance(getattr(old, k), Derived) or not getattr(old, k)
        }
        object.__setattr__(self, name, replace(old, **unset))
