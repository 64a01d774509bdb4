"""Whether this node can give jobs their scratch disks, for ``doctor``."""

from __future__ import annotations

from wnodes_core.doctor_finding import Finding
from wnodes_core.doctor_finding import notice as _notice
from wnodes_core.doctor_finding import ok as _ok
from wnodes_core.doctor_finding import problem as _problem
from wnodes_core.doctor_host import Host
from wnodes_core.errors import HostError, WnodesError
from wnodes_core.settings import Settings
from wnodes_core.settings.scratch import ScratchSettings


def scratch(host: Host, settings: Settings) -> Finding:
    """Can jobs be given scratch disks?"""
    folder = settings.scratch.folder
    if folder != "lease" and (not (found := host.stat(folder)) or found.st_mode & 0o1777 != 0o1777):
        return _problem("scratch", f"{folder}: not a folder of mode 1777", f"install -d -m 1777 {folder}")
    if not host.program("mke2fs"):
        return _notice("scratch", "no mke2fs", "install e2fsprogs: a job that asks for scratch drains the node")
    if settings.scratch.group:
        return _volumes(host, settings.scratch)
    return _ok("scratch", folder)


def _volumes(host: Host, scratch: ScratchSettings) -> Finding:
    where = f"volumes of {scratch.group}" + (f" in thin pool {scratch.pool}" if scratch.pool else ", plain")
    if not (host.program("lvs") and host.program("blkdiscard")):
        return _problem("scratch", f"{where}: no lvs or no blkdiscard", "install lvm2 and util-linux")
    try:
        lacks = host.volumes(scratch)
    except WnodesError as error:
        tell = _problem if isinstance(error, HostError) else _notice  # only root may ask LVM
        return tell("scratch", f"{where}: {error.message}", error.hint or "ask as root")
    if lacks:
        return _notice("scratch", "; ".join(seen for seen, _ in lacks), "; ".join(advice for _, advice in lacks))
    return _ok("scratch", where)
