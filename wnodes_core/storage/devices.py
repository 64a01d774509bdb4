"""What mounts that are devices of the VM have in common, whoever serves them: the guest mounts them by their tag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wnodes_core.api import Mount
from wnodes_core.errors import NoProvider
from wnodes_core.storage.sshfs import check_source

_STAGES = "/run/wnodes/mounts"
_MOUNT_TIMEOUT_S = 60.0
# A device that was just plugged in is not there at once. What mount(8) says is heard when it has said it to the end.
_MOUNT = """
left=${WNODES_LOOKS:-300}
until said=$(mount -t "$1" -o "$2" "$3" "$4" 2>&1); do
    left=$((left - 1))
    if [ "$left" -le 0 ]; then echo "$said" >&2; exit 1; fi
    sleep 0.05
done
"""


def check(name: str, mount: Mount, image: Mapping[str, Any]) -> None:
    """Before a device is made. Raises MountDenied, and NoProvider where the image's catalogue entry says no."""
    check_source(mount)
    if str(image.get(name)).lower() in ("no", "false"):
        raise NoProvider(f"mount {mount}: the image knows no {name}")


def filesystem(name: str, mount: Mount, index: int, source: str) -> dict[str, Any]:
    """The device in the VM; ``source`` is what QEMU opens."""
    return {"kind": name, "source": source, "tag": f"wnodes{index}", "read_only": mount.read_only}


def attachment(name: str, mount: Mount, guest: Mapping[str, Any], options: str) -> dict[str, Any]:
    """How the guest mounts the device that this provider made. Raises MountDenied, NoProvider."""
    check_source(mount)
    equipped = guest.get("equipped") or {}
    if equipped.get("provider") != name:
        raise NoProvider(f"mount {mount}: the VM has no device for it", hint=f"put {name} first in storage.order")
    if guest.get(name) is False:
        hint = f"facts: {{{name}: no}} in the image's entry says so"
        raise NoProvider(f"mount {mount}: the guest's kernel has no {name}", hint=hint)
    stage = f"{_STAGES}/{guest['port']}"
    shown = {"stage": stage, "target": mount.target, "read_only": mount.read_only, "read_ahead_kib": 0}
    argv = ["sh", "-c", _MOUNT, name, name, options, equipped["filesystem"]["tag"], stage]
    step = {"argv": argv, "mount": shown, "timeout_s": _MOUNT_TIMEOUT_S}
    return {"provider": name, "process": None, "guest": [step], "notice": ""}
