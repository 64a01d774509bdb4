"""Scratch as a logical volume a lease, made by wnodesd as root: thin where the settings name a pool, else plain.

Nobody ever reads what another has written: a plain volume is overwritten with zeros before its node is given away,
and a thin pool zeroes each chunk that it hands out (a pool that does not is refused). Ours are known by tags that
they have from the moment they are made; what has none of them is never touched.

The user's QEMU opens a node of its own, outside of what udev manages, so that udev cannot take it back. It lies in
/dev, which a reboot empties: a number given away before a reboot means another volume after it.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wnodes_core.api import Volume, errors, hookimpl
from wnodes_core.tools import kill, read, run, table

wnodes_api = 1

TAG = "wnodes"
_ASK_S, _MAKE_S, _WIPE_S, _SLOWEST_MIB_S = 20.0, 60.0, 60.0, 20
_FIELDS = "lv_name,lv_size,lv_tags,pool_lv,segtype,lv_kernel_major,lv_kernel_minor,data_percent,metadata_percent"
_FIELDS += ",zero,lv_when_full"
_REPORT = ["--reportformat", "json", "--units", "b", "--nosuffix"]
_NO_ROOM = ("insufficient free space", "insufficient suitable", "free extents", "out of space", "maximum number")
_room = threading.Lock()  # from looking for room to taking it


@dataclass(frozen=True)
class Lv:
    """A logical volume as ``lvs`` reports it; size in bytes, percents of a pool, which ``zeroes`` what it hands out."""

    name: str
    size: int
    tags: frozenset[str]
    pool: str
    kind: str
    device: tuple[int, int]
    data: float
    metadata: float
    zeroes: bool
    when_full: str


@hookimpl
def wnodes_volume_attach(volume: Volume) -> bool:
    """Make the volume, wiped, and its node; what there was of it goes first."""
    with _room:
        found = volumes_of(volume.group)
        if old := _of_name(found, volume.name):
            if not _is_ours(old, volume.owner):
                raise errors.TransientError(f"{volume.group}/{volume.name} exists and is not ours")
            _remove(volume, old)
            found = [each for each in found if each is not old]
        if volume.pool:
            _check_promises(volume, found)
        _create(volume)
    made = _of_name(volumes_of(volume.group), volume.name)
    if made is None or made.device[0] < 0:
        raise errors.TransientError(f"{volume.group}/{volume.name}: it is not active after it was made")
    _make_node(volume.node, made.device)
    if not volume.pool:
        _wipe(volume)
    os.chown(volume.node, volume.uid, volume.gid, follow_symlinks=False)
    return True


@hookimpl
def wnodes_volume_detach(volume: Volume) -> bool:
    """Remove node and volume."""
    with suppress(FileNotFoundError):
        os.unlink(volume.node)
    made = _of_name(volumes_of(volume.group), volume.name)
    if made and _is_ours(made, volume.owner):
        _remove(volume, made)
    return True


def _remove(volume: Volume, made: Lv) -> None:
    """The node first: the number that it names is another's soon."""
    with suppress(FileNotFoundError):
        os.unlink(volume.node)
    said = _lvremove(volume)
    if said and _end_holders(made.device, volume.uid):
        said = _lvremove(volume)
    if said:
        users = ", ".join(f"{pid} (uid {uid})" for pid, uid in _holders(made.device))
        what = f"{volume.group}/{volume.name} cannot be removed: {said}"
        raise errors.TransientError(f"{what}{f'; open in process {users}' if users else ''}")


def _lvremove(volume: Volume) -> str:
    """'' when it is gone, else LVM's words."""
    try:
        run(["lvremove", "-y", "-f", f"{volume.group}/{volume.name}"], timeout_s=_MAKE_S)
    except errors.CommandError as error:
        return error.stderr_tail.strip()[-300:] or str(error)
    return ""


@hookimpl
def wnodes_volume_list(group: str, owner: str, folder: str) -> list[Volume]:
    """Ours by their tags, and the nodes that are left of some."""
    names = {each.name for each in volumes_of(group) if _is_ours(each, owner)}
    with suppress(FileNotFoundError):
        names |= set(os.listdir(folder))
    return [Volume(name.removeprefix("wnodes-"), group, owner, f"{folder}/{name}") for name in sorted(names)]


def volumes_of(group: str) -> list[Lv]:
    """All logical volumes of a group. Raises HostError where there is no such group, TransientError."""
    return [_lv(each) for each in _report(["lvs", *_REPORT, "-o", _FIELDS, group])]


def problems(group: str, pool: str) -> list[tuple[str, str]]:
    """What ``wnodes doctor`` has to say of a group and its thin pool, each with what to do about it.

    Raises HostError, TransientError.
    """
    found = volumes_of(group)
    if not pool:
        return []
    thin = _pool(group, pool, found)
    seen = []
    if thin.when_full != "error":
        text = f"{group}/{pool} queues writes when it is full: a job's then hang for a minute before they fail"
        seen.append((text, f"lvchange --errorwhenfull y {group}/{pool}"))
    return seen


def _check_promises(volume: Volume, found: Sequence[Lv]) -> None:
    """What a thin pool could not keep, LVM would promise all the same. Raises HostBusy, HostError."""
    pool = _pool(volume.group, volume.pool, found)
    where = f"thin pool {volume.group}/{volume.pool}"
    for what, percent in (("data", pool.data), ("metadata", pool.metadata)):
        if percent > volume.full_percent:
            raise _busy(volume, f"{percent:g} % of the {what} of {where} are used (limit {volume.full_percent} %)")
    promised = sum(each.size for each in found if each.pool == volume.pool)
    left = pool.size * volume.promise_percent // 100 - promised
    if left < volume.size_mib << 20:
        raise _busy(volume, f"{max(0, left) >> 20} MiB of {where} are not promised yet")


def _pool(group: str, name: str, found: Sequence[Lv]) -> Lv:
    pool = next((each for each in found if each.name == name and each.kind == "thin-pool"), None)
    if pool is None:
        raise errors.HostError(f"scratch: {group}/{name} is no thin pool", hint="scratch.thin_pool names one")
    if not pool.zeroes:
        text = f"scratch: thin pool {group}/{name} hands out chunks with what others wrote"
        raise errors.HostError(text, hint=f"lvchange --zero y {group}/{name}")
    return pool


def _create(volume: Volume) -> None:
    # Neither zeroed nor looked at for old signatures by LVM: all of it is wiped, through our own node.
    size = ["-Wn", "-Zn", "-L", f"{volume.size_mib}m", volume.group]
    if volume.pool:
        size = ["-V", f"{volume.size_mib}m", "--thinpool", volume.pool, volume.group]
    tags = [word for tag in _tags(volume.owner) for word in ("--addtag", tag)]
    try:
        run(["lvcreate", "-y", "-q", *tags, "-n", volume.name, *size], timeout_s=_MAKE_S)
    except errors.CommandError as error:
        said = error.stderr_tail.strip()
        if any(words in said.lower() for words in _NO_ROOM):
            raise _busy(volume, said[-300:]) from error
        raise errors.TransientError(f"scratch volume {volume.name}: {said[-300:] or error}") from error


def _wipe(volume: Volume) -> None:
    # -z: zeros, written by the device itself where it can. A discard would only be a hint.
    try:
        run(["blkdiscard", "-z", volume.node], timeout_s=_WIPE_S + volume.size_mib / _SLOWEST_MIB_S)
    except errors.CommandError as error:
        raise errors.TransientError(f"scratch volume {volume.name} could not be wiped: {error}") from error


def _make_node(path: str, device: tuple[int, int]) -> None:
    folder = os.path.dirname(path)
    for each in (os.path.dirname(folder), folder):
        os.makedirs(each, mode=0o711, exist_ok=True)
        os.chmod(each, 0o711)
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(*device))


def _end_holders(device: tuple[int, int], uid: int) -> bool:
    """End processes of the lease's user that have the volume open: its lease is over. Whether there were any."""
    mine = [process for pid, owner in _holders(device) if uid and owner == uid and (process := read(pid))]
    for process in mine:
        kill(process)
    return bool(mine)


def _holders(device: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Pid and uid of processes that have the device open."""
    wanted = os.makedev(*device) if device[0] >= 0 else -1
    for process in table(command_of_users=False):
        with suppress(OSError):
            folder = f"/proc/{process.pid}/fd"
            if any(_opens(f"{folder}/{fd}", wanted) for fd in os.listdir(folder)):
                yield process.pid, process.uid


def _opens(path: str, device: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device


def _report(argv: list[str]) -> list[dict[str, str]]:
    try:
        said = json.loads(run(argv, timeout_s=_ASK_S).text)
        found: list[dict[str, str]] = said["report"][0]["lv"]
    except errors.CommandError as error:
        if error.exit_code == 127:
            raise errors.HostError("scratch: there is no LVM here", hint="install lvm2") from error
        tail = error.stderr_tail.strip()[-300:]
        if "not found" in tail:
            raise errors.HostError(f"scratch: {tail}", hint="scratch.volume_group names a volume group") from error
        raise errors.TransientError(f"scratch: {argv[0]}: {tail or error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise errors.TransientError(f"scratch: {argv[0]} says what cannot be understood: {error!r}") from error
    return found


def _of_name(found: Sequence[Lv], name: str) -> Lv | None:
    return next((each for each in found if each.name == name), None)


def _lv(each: dict[str, Any]) -> Lv:
    return Lv(
        name=each["lv_name"],
        size=int(each["lv_size"]),
        tags=frozenset(filter(None, each["lv_tags"].split(","))),
        pool=each["pool_lv"],
        kind=each["segtype"],
        device=(int(each["lv_kernel_major"] or -1), int(each["lv_kernel_minor"] or -1)),
        data=float(each["data_percent"] or 0),
        metadata=float(each["metadata_percent"] or 0),
        zeroes=each["zero"] not in ("", "0"),
        when_full=each["lv_when_full"],
    )


def _tags(owner: str) -> tuple[str, str]:
    return TAG, f"{TAG}.{owner}"


def _is_ours(lv: Lv, owner: str) -> bool:
    return lv.tags.issuperset(_tags(owner))


def _busy(volume: Volume, why: str) -> errors.HostBusy:
    return errors.HostBusy(f"scratch of {volume.size_mib} MiB: {why}", hint="ask for less scratch")
