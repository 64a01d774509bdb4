"""wnodesd's templates: choosing one for a lease, handing it to the keeper, having it built, letting it go."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from wnodes_core import command
from wnodes_core.agent.daemon import Daemon, log
from wnodes_core.agent.leases import Lease
from wnodes_core.errors import CommandError, WnodesError
from wnodes_core.journal import Resource
from wnodes_core.model import Image, Template, VmRequest
from wnodes_core.mounting import needs_device
from wnodes_core.plan import guest_memory_mib
from wnodes_core.templates import Wanted, sealed
from wnodes_core.templates.choose import Chooser, Size

IDLE_S = 600.0  # a template's memory that no job took for so long is let go; the file stays
RETRY_S = 600.0  # an image whose template could not be built is not tried again before
KIND = "template"  # in a lease's journal: the user was let into a restricted template's folder


@dataclass
class _Loaded:
    fd: int
    used: float


@dataclass
class _State:
    loaded: dict[str, _Loaded] = field(default_factory=dict)
    failed: dict[str, tuple[float, str]] = field(default_factory=dict)  # until when, and the kind of error
    building: dict[str, asyncio.Future[Any]] = field(default_factory=dict)


class Warm:
    """The templates of this node, as the settings of the moment want them."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._state = _State()
        self._loading = asyncio.Lock()
        self._one = asyncio.Lock()

    def _chooser(self) -> Chooser:
        return Chooser(self._daemon.settings, self._daemon.parts.backend())

    async def choose(self, lease: Lease, image: Image, accel: str) -> Template | None:
        """The template that this lease's VM is cloned from, made first if the request demands it; else None."""
        request, chooser = lease.request, self._chooser()
        if request.start == "cold" or await self._daemon.quick(self._wants_devices, request):
            return None
        size = self._size(lease, accel)
        wanted = await self._daemon.quick(chooser.wanted, image, accel, size)
        if request.start == "warm" and wanted:
            await self._built(wanted[0], chooser, accel, lease)
        template: Template | None = await self._daemon.quick(chooser.find, wanted, size)
        if template is None:
            failed = [self._state.failed[each.id][1] for each in wanted if each.id in self._state.failed]
            lease.no_clone = failed[0] if failed and request.start == "warm" else ""
            return None
        try:
            await self._let_in(lease, template)
            return await self._with_memory(template, lease)
        except (WnodesError, OSError) as error:
            log.warning("template %s: %s", template.id, error, extra={"event": "warm", "lease": lease.id})
            lease.no_clone = type(error).__name__
            return None

    def _wants_devices(self, request: VmRequest) -> bool:
        order = request.storage or self._daemon.settings.storage.order
        return needs_device(self._daemon.parts.backend(), order, request.mounts)

    def images(self) -> set[str]:
        """Digests of the images that can start warm here. Blocks."""
        return {kept.template.image for kept in self._chooser().shelf.all()}

    def gauges(self) -> dict[str, float]:
        """For the metrics."""
        return {"templates": len(self._chooser().shelf.all())}

    def _size(self, lease: Lease, accel: str) -> Size:
        memory = guest_memory_mib(lease.request, lease.job, self._daemon.settings, accel)
        return Size.of(lease.request, lease.job.cpus, memory)

    # -- handing over -----------------------------------------------------------------------------

    async def _let_in(self, lease: Lease, template: Template) -> None:
        """Let the job's user read what is restricted, for as long as the lease."""
        folder = await self._daemon.quick(os.lstat, template.folder)
        if folder.st_mode & stat.S_IXOTH or lease.job.uid == folder.st_uid:
            return
        await self._daemon.whole(self._granted(lease, template))

    async def _granted(self, lease: Lease, template: Template) -> None:
        async with lease.lock:
            self._daemon.refuse_if_over(lease)
            await self._daemon.quick(self._grant, lease, template)

    def _grant(self, lease: Lease, template: Template) -> None:
        with lease.journal.making_it(KIND, template.folder, uid=lease.job.uid):
            command.run(["setfacl", "-m", f"u:{lease.job.uid}:rx", "--", template.folder], timeout_s=10)

    def undo(self, lease: Lease, resource: Resource) -> None:
        """End that access, unless another lease of the user still needs it. Raises CommandError."""
        for other in list(self._daemon.leases.values()):
            names = [each.name for each in other.journal.open_resources if each.kind == KIND]
            if other is not lease and other.job.uid == lease.job.uid and resource.name in names:
                return
        if os.path.isdir(resource.name):
            command.run(["setfacl", "-x", f"u:{lease.job.uid}", "--", resource.name], timeout_s=10)

    async def _with_memory(self, template: Template, lease: Lease) -> Template:
        """With its memory sealed for others; the keeper gets it as an open file (``fds``)."""
        if not template.memory:
            return template
        await self.memory_of(template)
        lease.template = template.id
        return replace(template, memory="")

    async def memory_of(self, template: Template) -> int:
        """The template's memory as a sealed open file, which stays ours to close. Raises WnodesError."""
        loaded = self._state.loaded.get(template.id)
        if loaded is None:
            # To its end even if who asked has gone: what was loaded must be noted, or nobody closes it.
            loaded = await self._daemon.whole(self._load(template))
        loaded.used = time.monotonic()
        return loaded.fd

    async def _load(self, template: Template) -> _Loaded:
        async with self._loading:
            loaded = self._state.loaded.get(template.id)
            if loaded is None:
                fd = await self._daemon.slow(sealed.load, template.memory, template.id)
                loaded = self._state.loaded[template.id] = _Loaded(fd, time.monotonic())
        return loaded

    async def of_pool(self, image: Image, accel: str, cpus: int) -> Template | None:
        """The template for clones that wait, built first unless the site forbids it; None if it cannot be had."""
        chooser, base = self._chooser(), self._daemon.settings.warm.base_memory_mib
        size = Size(cpus, base, 0)
        wanted = (await self._daemon.quick(chooser.wanted, image, accel, size))[:1]
        found: Template | None = await self._daemon.quick(chooser.find, wanted, size)
        if found is None and wanted and self._daemon.settings.warm.build != "never":
            await self._built(wanted[0], chooser, accel, None)
            found = await self._daemon.quick(chooser.find, wanted, size)
        if found and found.id in self._state.loaded:
            self._state.loaded[found.id].used = time.monotonic()  # the next clone of it is the pool's
        return found

    def fds(self, lease: Lease) -> list[int]:
        """What the lease's keeper is handed open: the memory of its template, or nothing."""
        loaded = self._state.loaded.get(lease.template)
        return [loaded.fd] if loaded else []

    # -- building ---------------------------------------------------------------------------------

    def began(self, lease: Lease) -> None:
        """A lease's VM runs: if it was booted, the next of its kind need not be."""
        wish = self._daemon.settings.warm.build == "on_use" and lease.request.start != "cold"
        if wish and lease.image and not lease.template:
            self._daemon.background(self._build_for(lease, lease.image), f"template of {lease.request.image}")

    async def _build_for(self, lease: Lease, image: Image) -> None:
        chooser = self._chooser()
        assert self._daemon.accel is not None
        accel = await asyncio.shield(self._daemon.accel)
        wanted = await self._daemon.quick(chooser.wanted, image, accel, self._size(lease, accel))
        if wanted and not await self._daemon.quick(chooser.find, wanted[:1], self._size(lease, accel)):
            await self._built(wanted[0], chooser, accel, None)

    async def _built(self, wanted: Wanted, chooser: Chooser, accel: str, waiting: Lease | None) -> None:
        """Have it built, once for all who wait; a failure is noted and leaves them to boot."""
        if time.monotonic() < self._state.failed.get(wanted.id, (0.0, ""))[0]:
            return
        going = self._state.building.get(wanted.id)
        if going is None:
            going = asyncio.ensure_future(self._build(wanted, chooser, accel))
            self._state.building[wanted.id] = going
            going.add_done_callback(lambda _: self._state.building.pop(wanted.id, None))
        if waiting:
            waiting.progress = f"building a template of {wanted.image.name}"
        await asyncio.shield(going)

    async def _build(self, wanted: Wanted, chooser: Chooser, accel: str) -> None:
        async with self._one:  # the memory that the next one sees free is free
            await self._build_alone(wanted, chooser, accel)

    async def _build_alone(self, wanted: Wanted, chooser: Chooser, accel: str) -> None:
        if available_mib() < wanted.base_mib + self._daemon.settings.warm.pool_min_free_mib:
            log.info("no template of %s: the node's memory is needed", wanted.image.name, extra={"event": "warm"})
            return
        began = time.monotonic()
        try:
            await self._daemon.slow(lambda: chooser.builder(accel).build(wanted))
        except (WnodesError, OSError) as error:
            self._state.failed[wanted.id] = time.monotonic() + RETRY_S, type(error).__name__
            log.warning("%s", error, extra={"event": "warm"})
            return
        seconds = round(time.monotonic() - began, 3)
        log.info("template of %s", wanted.image.name, extra={"event": "template", "seconds": seconds})
        self._daemon.advertise_wanted.set()

    # -- keeping ----------------------------------------------------------------------------------

    async def tend(self) -> None:
        """Let idle memory go, and throw away what can serve nobody; called now and then."""
        chooser = self._chooser()
        for template_id, loaded in list(self._state.loaded.items()):
            there = await self._daemon.quick((chooser.shelf.root / template_id).exists)
            if not there or time.monotonic() - loaded.used > IDLE_S:
                del self._state.loaded[template_id]
                os.close(loaded.fd)
        if not self._state.building and chooser.shelf.root.is_dir():
            try:
                await self._daemon.slow(chooser.builder("").sweep)
            except (WnodesError, CommandError, OSError) as error:
                log.warning("templates: %s", error, extra={"event": "warm"})


def available_mib() -> int:
    """Memory that the kernel says could be had without swapping."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) >> 10
    return 0
