"""Which template a VM could be cloned from: all that a saved guest hangs on, as one name."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from wnodes_core.guest import bundle
from wnodes_core.model import Image, Template

FORMAT = 2  # of what a builder leaves; a change makes every older template another's
ID_LENGTH = 25
MOUNT_PORTS = 6  # mounts that a clone can have: ports cannot be plugged in
_STEP_MIB = 128  # the granularity of memory hot-plug on x86


@dataclass(frozen=True)
class Wanted:
    """What a template must have been made of. ``host`` is the backend's word for the hypervisor."""

    image: Image
    accel: str
    cpus: int
    base_mib: int
    most_mib: int
    host: str

    @classmethod
    def of(cls, image: Image, accel: str, cpus: int, base_mib: int, hook: Any) -> Wanted | None:
        """The template for a VM on this host; None where no backend clones."""
        if not any(hook.wnodes_template_ways(accel=accel)):
            return None
        host: str | None = hook.wnodes_template_host(accel=accel)
        return cls(image, accel, cpus, base_mib, max(base_mib, most_mib()), host) if host else None

    @property
    def id(self) -> str:
        """A file name: the image's beginning for people, the digest of everything for us.

        Short, because sockets lie in folders of this name. An image that is tagged anew, an upgraded QEMU or
        agent: another name, so never a wrong guest.
        """
        facts = [FORMAT, self.accel, self.cpus, self.base_mib, self.most_mib, self.host, bundle.agent_digest()]
        image = [self.image.digest, self.image.path, self.image.format, self.image.arch, dict(self.image.facts)]
        boot = asdict(self.image.boot) if self.image.boot else None
        text = json.dumps([facts, image, boot], sort_keys=True)
        return f"{self.image.digest.removeprefix('sha256:')[:8]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def suits(self, template: Template, memory_mib: int, mounts: int) -> bool:
        """Whether a clone can have exactly this memory and so many mounts."""
        return template.shape.fits(self.cpus, memory_mib) and mounts <= template.mount_ports


def most_mib() -> int:
    """Up to where a clone's memory can grow: all that the node has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return total // _STEP_MIB * _STEP_MIB
