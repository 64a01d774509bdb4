"""Whether the wnodesd that runs may do what the settings ask of it, for ``doctor``.

Under systemd it has the rights of its unit; each drop-in that we ship (``wnodesd --print-drop-in``) adds those of one
use. Numbers of capabilities: include/uapi/linux/capability.h.
"""

from __future__ import annotations

import re

from wnodes_core.doctor_host import Host
from wnodes_core.settings import Settings

_NEEDS = {
    "network": {"CAP_NET_ADMIN": 12},
    "lvm": {"CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27},
    "nfs": {"CAP_SYS_ADMIN": 21, "CAP_NET_BIND_SERVICE": 10},
}


def lacking(host: Host, settings: Settings, pid: int) -> dict[str, str]:
    """The drop-ins that process ``pid`` is without and needs, each with the names of the missing rights.

    {} also where its rights cannot be seen.
    """
    told = re.search(r"(?m)^CapBnd:\s*([0-9a-f]+)$", host.text(f"/proc/{pid}/status"))
    if told is None:
        return {}
    has = int(told[1], 16)
    lacks = {}
    for use in _uses(host, settings):
        if rights := [right for right, bit in _NEEDS[use].items() if not has >> bit & 1]:
            lacks[use] = " ".join(rights)
    return lacks


def _uses(host: Host, settings: Settings) -> list[str]:
    carried = [rule for rule in settings.network.networks if rule.carried_by(host.node_name())]
    uses = ["network"] if any(rule.kind != "user" for rule in carried) else []
    orders = (settings.storage.order, *(rule.storage for rule in settings.policy))
    uses += ["lvm"] if settings.scratch.group else []
    return uses + (["nfs"] if any("nfs" in order for order in orders) else [])
