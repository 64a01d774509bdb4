"""What a job may have: the site's rules applied to one request, then the site's own plug-ins.

Rules that match are put together in order: of ``default_image``, ``default_network``, ``storage``, ``max_cpus`` and
``max_memory_mib`` the last one given wins; ``mounts``, ``images``, ``networks``, ``may_become`` and ``allow_mounts``
add up. Where no matching rule gives ``images`` or ``allow_mounts`` nothing is denied: mounts are served with the
user's own rights anyway. A plug-in of ``wnodes_request_admit`` is the site's word too, so what it
changes is checked for sense (targets, the job's own limits) but not against the rules again.

Pure: of the system only the user database is asked, and only if a rule needs it.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from wnodes_core import policy_network
from wnodes_core.errors import BadRequest, BrokenPlugin, ImageDenied, LimitExceeded, MountDenied, RequestError
from wnodes_core.model import ImageRef, Job, Mount, VmRequest
from wnodes_core.settings.schema import Rule, Settings
from wnodes_core.settings.values import expand_mount, expand_place

# Guest folders that belong to the guest: with all below them, or only themselves. /lib and its kin
# are links into /usr on a merged-/usr guest (file-hierarchy(7)); /var/run is one to /run.
_GUEST_TREES = (
    *("/usr", "/etc", "/proc", "/sys", "/dev", "/run", "/boot", "/bin", "/sbin", "/var/run"),
    *("/lib", "/lib32", "/lib64", "/libx32"),
)
_GUEST_FOLDERS = ("/", "/var", "/var/lib")
MAX_MOUNTS = 24  # each is a port; a virtio-serial controller has 31
BECOME_PORTS = 4  # of them, for accounts that a job may become, if its rule says no number


@dataclass(frozen=True)
class Person:
    """The job's user as the system's databases know them."""

    home: str
    groups: tuple[str, ...]


def look_up(job: Job) -> Person:
    """Home and group names of the job's user. Raises RequestError if there is no such user."""
    try:
        entry = pwd.getpwuid(job.uid)
    except KeyError:
        raise RequestError(f"uid {job.uid} has no account on this node") from None
    gids = dict.fromkeys([job.gid, *os.getgrouplist(entry.pw_name, job.gid)])
    return Person(entry.pw_dir, tuple(name for gid in gids if (name := _group_name(gid))))


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def admit(
    request: VmRequest, job: Job, settings: Settings, hook: Any = None, *, person_of: Callable[[Job], Person] = look_up
) -> VmRequest:
    """The request with the site's defaults and mounts in it, if this job may have it.

    Mounts come back parents first, the job's working folder among them. ``hook`` is the plug-ins'
    relay; None asks none.

    Raises RequestError (ImageDenied, MountDenied, LimitExceeded, BadRequest), or what a plug-in raises.
    """
    # A user database may be a slow service: asked at most once, and only if a rule needs it.
    known: list[Person] = []

    def person() -> Person:
        if not known:
            known.append(person_of(job))
        return known[0]

    rule = rule_for(job, settings.policy, person)
    request = replace(request, image=_image(request, rule), storage=rule.storage)
    request = _within_site_limits(request, job, rule, settings.vm.min_memory_mib)
    request = replace(request, scratch_mib=request.scratch_mib or rule.default_scratch_mib or None)
    _check_asked_mounts(request.mounts, job, rule, person)
    site = tuple(Mount.parse(expand_mount(text, _home(text, person), job.user)) for text in rule.mounts)
    request = replace(request, mounts=arranged(request.mounts + site))
    if work_dir := work_dir_mount(job, request.mounts):
        request = replace(request, mounts=arranged((*request.mounts, work_dir)))
    request = replace(request, spare_mounts=min(become_ports(rule), MAX_MOUNTS - len(request.mounts)))
    request = policy_network.admitted(request, job, rule, settings.network)
    request = asked_plugins(request, job, hook)
    _check_job_limits(request, job)
    return request


def rule_for(job: Job, rules: Iterable[Rule], person: Callable[[], Person]) -> Rule:
    """All rules that match this job, put together into one."""
    merged = Rule()
    for rule in rules:
        if not _matches(rule, job, person):
            continue
        merged = replace(
            merged,
            images=_added(merged.images, rule.images),
            allow_mounts=_added(merged.allow_mounts, rule.allow_mounts),
            networks=_added(merged.networks, rule.networks),
            default_network=rule.default_network or merged.default_network,
            storage=rule.storage or merged.storage,
            may_become=merged.may_become + rule.may_become,
            become_ports=rule.become_ports or merged.become_ports,
            mounts=merged.mounts + tuple(m for m in rule.mounts if m not in merged.mounts),
            default_image=rule.default_image or merged.default_image,
            max_cpus=rule.max_cpus or merged.max_cpus,
            max_memory_mib=rule.max_memory_mib or merged.max_memory_mib,
            default_scratch_mib=rule.default_scratch_mib or merged.default_scratch_mib,
            max_scratch_mib=rule.max_scratch_mib or merged.max_scratch_mib,
        )
    return merged


def become_ports(rule: Rule) -> int:
    """How many mounts the accounts that a job may become can have in its VM, together."""
    return (rule.become_ports or BECOME_PORTS) if rule.may_become else 0


def _added(old: tuple[str, ...] | None, new: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return old if new is None else (old or ()) + new


def _matches(rule: Rule, job: Job, person: Callable[[], Person]) -> bool:
    facts = ((rule.users, job.user), (rule.queues, job.queue), (rule.accounts, job.account))
    if any(patterns and not _any_match(patterns, fact) for patterns, fact in facts):
        return False
    return not rule.groups or any(_any_match(rule.groups, group) for group in person().groups)


def _any_match(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _image(request: VmRequest, rule: Rule) -> str:
    image = request.image or rule.default_image
    if not image:
        raise BadRequest("no image asked for, and the site has no default for you", hint="name one, as in image=NAME")
    reference = ImageRef.parse(image)
    if rule.images is None or any(_image_matches(reference, pattern) for pattern in rule.images):
        return image
    allowed = ", ".join(rule.images) or "none"
    raise ImageDenied(f"image {image!r} is not allowed for you here: want one of {allowed}")


def _image_matches(reference: ImageRef, pattern: str) -> bool:
    """Whether a pattern allows an image: NAME stands for all its tags, NAME:TAG for that tag.

    A request without a tag gets a tag later, from the catalogue, so only NAME or NAME:* allow it.
    """
    name, _, tag = pattern.partition(":")
    tag_matches = fnmatchcase(reference.tag, tag) if reference.tag else tag == "*"
    return fnmatchcase(reference.name, name) and (not tag or tag_matches)


def _within_site_limits(request: VmRequest, job: Job, rule: Rule, least_mib: int) -> VmRequest:
    """Refuse a wish beyond the site's limits; cap what the job has by them where nothing was wished."""
    _check_job_limits(request, job)
    for what, asked, most, unit in (
        ("cpus", request.cpus, rule.max_cpus, ""),
        ("memory", request.memory_mib, rule.max_memory_mib, " MiB"),
        ("scratch", request.scratch_mib, rule.max_scratch_mib, " MiB"),
    ):
        if asked and most and asked > most:
            raise LimitExceeded(f"{what} {asked}{unit} asked for, the site allows a VM {most}{unit}")
    if request.memory_mib is not None and request.memory_mib < least_mib:
        raise LimitExceeded(f"memory {request.memory_mib} MiB asked for, a VM needs at least {least_mib} MiB")
    if request.cpus is None and rule.max_cpus and job.cpus > rule.max_cpus:
        request = replace(request, cpus=rule.max_cpus)
    if request.memory_mib is None and rule.max_memory_mib and job.memory_mib > rule.max_memory_mib:
        request = replace(request, memory_mib=rule.max_memory_mib)
    return request


def _check_job_limits(request: VmRequest, job: Job) -> None:
    for what, asked, has, unit in (
        ("cpus", request.cpus, job.cpus, ""),
        ("memory", request.memory_mib, job.memory_mib, " MiB"),
    ):
        if asked and has and asked > has:
            raise LimitExceeded(
                f"{what} {asked}{unit} asked for, the job has {has}{unit} on this node",
                hint=f"ask the batch system for more {what}, or the VM for less",
            )


def _check_asked_mounts(mounts: Iterable[Mount], job: Job, rule: Rule, person: Callable[[], Person]) -> None:
    if rule.allow_mounts is None:
        return
    allowed = [expand_place(text, _home(text, person), job.user) for text in rule.allow_mounts]
    for mount in mounts:
        if not any(inside(mount.source, folder) for folder in allowed):
            raise MountDenied(
                f"mount '{mount}': {mount.source!r} is outside what the site lets you mount",
                hint=f"allowed: {', '.join(allowed) or 'none'}",
            )


def _home(text: str, person: Callable[[], Person]) -> str:
    return person().home if "~" in text else ""


def inside(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or lies below it, by whole components.

    >>> inside("/data/x", "/data"), inside("/database", "/data"), inside("/any", "/")
    (True, False, True)
    """
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def guest_owns(target: str) -> bool:
    """Whether a mount at this guest path would hide the guest's own system."""
    if target == "/usr/local" or target.startswith(("/usr/local/", "/dev/shm/")):
        return False
    return target in _GUEST_FOLDERS or any(inside(target, tree) for tree in _GUEST_TREES)


def work_dir_mount(job: Job, mounts: Iterable[Mount] = ()) -> Mount | None:
    """The mount that shows the job its working folder at its own path, or None if there is no need.

    None for a folder that the guest has itself (``/``, ``/etc/...``), for one that another mount
    shows at its own path already, and where the user has another folder mounted in its place.
    """
    path = job.work_dir
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        return None
    path = "/" + "/".join(p for p in path.split("/") if p not in ("", "."))
    covering = [m for m in mounts if inside(path, m.target)]
    nearest = max(covering, key=lambda m: len(m.target), default=None)
    if guest_owns(path) or (nearest and (nearest.target == path or shown_at(path, nearest))):
        return None
    return Mount(path, path)


def shown_at(path: str, mount: Mount) -> bool:
    """Whether the guest sees the host's ``path`` at the same path through this mount."""
    return mount.source == mount.target or mount.source.rstrip("/") + path[len(mount.target.rstrip("/")) :] == path


def arranged(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The mounts in an order that works, parents first, each once.

    Raises MountDenied for a target that is the guest's own, or that is asked for twice.
    """
    by_target: dict[str, Mount] = {}
    for mount in mounts:
        if len(by_target) >= MAX_MOUNTS:
            raise LimitExceeded(f"more than {MAX_MOUNTS} mounts")
        if guest_owns(mount.target):
            raise MountDenied(
                f"mount '{mount}': {mount.target!r} belongs to the guest's own system",
                hint="mount it elsewhere, as in /mnt/NAME",
            )
        other = by_target.setdefault(mount.target, mount)
        if other != mount:
            raise MountDenied(f"mount '{mount}': target {mount.target!r} is already that of mount '{other}'")
    return tuple(sorted(by_target.values(), key=lambda m: m.target.split("/")))


def asked_plugins(request: VmRequest, job: Job, hook: Any) -> VmRequest:
    """The request as the site's plug-ins want it; ``hook`` None asks none. Raises BrokenPlugin, or what one raises."""
    if hook is None:
        return request
    changed: list[VmRequest] = [
        answer for answer in hook.wnodes_request_admit(request=request, job=job) if answer != request
    ]
    if not changed:
        return request
    if any(answer != changed[0] for answer in changed):
        raise BrokenPlugin("plug-ins change the request in different ways", hint="see WNODES_TRACE=1, disable one")
    return replace(changed[0], mounts=arranged(changed[0].mounts))
