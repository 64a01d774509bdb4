"""Whether a VM is cloned, and from what: the request's wish, the site's settings, what lies on the shelf."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wnodes_core.errors import LimitExceeded, WnodesError
from wnodes_core.model import Image, Template, VmRequest
from wnodes_core.mounting import needs_device
from wnodes_core.plan import DEFAULT_CPUS
from wnodes_core.templates.shelf import Shelf
from wnodes_core.templates.wanted import MOUNT_PORTS, Wanted

if TYPE_CHECKING:
    from wnodes_core.templates.builder import Builder, Tell

_SMALLEST_MIB = 128


@dataclass(frozen=True)
class Size:
    """What the guest is to have: whole CPUs, its own RAM, so many mounts."""

    cpus: int
    memory_mib: int
    mounts: int

    @classmethod
    def of(cls, request: VmRequest, job_cpus: int, memory_mib: int) -> Size:
        """The size of an admitted request's VM."""
        return cls(request.cpus or job_cpus or DEFAULT_CPUS, memory_mib, len(request.mounts) + request.spare_mounts)


class Chooser:
    """The templates of this node (or user), as the settings want them."""

    def __init__(self, settings: Any, hook: Any) -> None:
        self._warm = settings.warm
        self._timeout_s = 2.0 * settings.vm.boot_timeout_s
        self._disabled = tuple(settings.plugins.disabled)
        self._hook = hook
        self._storage = settings.storage.order
        self.shelf = Shelf(self._warm.folder, max_templates=self._warm.max_templates, max_mib=self._warm.max_mib)

    def wanted(self, image: Image, accel: str, size: Size) -> list[Wanted]:
        """The templates that a VM of this size could be cloned from, there or not, the best first."""
        # A node's restricted image is not for the account that builds: its jobs are booted.
        closed = os.geteuid() == 0 and not os.stat(image.path).st_mode & stat.S_IROTH
        if size.mounts > MOUNT_PORTS or closed:
            return []
        bases = bases_for(size.memory_mib, self._warm.base_memory_mib)
        found = (Wanted.of(image, accel, size.cpus, base_mib, self._hook) for base_mib in bases)
        return [wanted for wanted in found if wanted]

    def find(self, wanted: list[Wanted], size: Size) -> Template | None:
        """The first template on the shelf of which a clone can have this size."""
        for each in wanted:
            template = self.shelf.find(each.id)
            if template and each.suits(template, size.memory_mib, size.mounts):
                return template
        return None

    def builder(self, accel: str) -> Builder:
        """Who makes templates here. Raises SettingsError."""
        from wnodes_core.templates.builder import Account, Builder  # 20 ms that a clone does not need

        offered = [way for ways in self._hook.wnodes_template_ways(accel=accel) for way in ways]
        ways = tuple(way for way in offered if self._warm.way in ("auto", way))
        return Builder(self.shelf, Account.of(self._warm.build_user), ways, self._timeout_s, self._disabled)

    def clone_or_none(self, request: VmRequest, image: Image, accel: str, size: Size, tell: Tell) -> Template | None:
        """What to clone for this request, built first if it says ``start=warm``; None to boot.

        Raises LimitExceeded if it demands a warm start that cannot be had at this size.
        """
        if request.start == "cold" or needs_device(self._hook, request.storage or self._storage, request.mounts):
            return None
        if self.shelf.leftovers():
            self.builder(accel).sweep()
        wanted = self.wanted(image, accel, size)
        found = self.find(wanted, size)
        if found or request.start != "warm":
            return found
        if not wanted:
            raise LimitExceeded(
                f"start=warm: no template could serve {size.memory_mib} MiB and {size.mounts} mounts here",
                hint=f"from {_SMALLEST_MIB} MiB and up to {MOUNT_PORTS} mounts, or start=auto",
            )
        try:
            self.builder(accel).build(wanted[0], tell)
        except WnodesError as error:
            tell(f"no warm start: {error.message}")
        return self.find(wanted, size)


def bases_for(memory_mib: int, wish_mib: int) -> list[int]:
    """The memory of templates for guests of ``memory_mib``: the site's wish or its halves, as far as they fit.

    Clones grow from it; they cannot shrink below it.

    >>> bases_for(2000, 512), bases_for(480, 512), bases_for(100, 512)
    ([512, 256, 128], [256, 128], [])
    """
    halves = (wish_mib >> n for n in range(wish_mib.bit_length()))
    return [base for base in halves if _SMALLEST_MIB <= base <= memory_mib]
