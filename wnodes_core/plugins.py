"""Finding and loading plug-ins. Built-ins use the same road as a stranger's package.

Registration order decides: built-ins first, then entry points, so that a site's plug-in is
asked before ours. A broken plug-in is kept as a report and raised only when it is asked for by
name; the others go on working.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from wnodes_core import hookspecs
from wnodes_core.errors import BrokenPlugin, NoProvider
from wnodes_core.markers import PROJECT

BUILTINS = (
    "wnodes_core.backends.libvirt.plugin",
    "wnodes_core.images.sources",
    "wnodes_core.images.disks",
    "wnodes_core.storage.scratch",
    "wnodes_core.storage.sshfs",
    "wnodes_core.network.user",
)
LRMS_GROUP = "wnodes.lrms"
PLUGIN_GROUP = "wnodes.plugins"
API_LEVELS = (1,)


@dataclass(frozen=True)
class Found:
    """One plug-in as ``wnodes plugins`` lists it; ``problem`` is '' when it is registered."""

    name: str
    origin: str
    api_level: int | None
    problem: str = ""


class Plugins:
    """The plug-in manager of one process. ``hook`` calls into all that is registered."""

    def __init__(
        self,
        *,
        lrms: str = "",
        disabled: Iterable[str] = (),
        builtins: Iterable[str] = BUILTINS,
        scan: bool = True,
    ) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        for specs in hookspecs.ALL:
            self._manager.add_hookspecs(specs)
        self.found: list[Found] = []
        for name in disabled:
            self._manager.set_blocked(name)
        for module in builtins:
            self._load(module, module, "built-in")
        if scan:
            self._scan()
        if lrms:
            self._load_lrms(lrms)
        if os.environ.get("WNODES_TRACE") == "1":
            self._trace()

    @property
    def hook(self) -> Any:
        """pluggy's hook relay: ``plugins.hook.wnodes_vm_start(vm=…)``."""
        return self._manager.hook

    def register(self, plugin: object, name: str) -> None:
        """Register an object that is at hand (tests, embedders)."""
        self._register(plugin, name, "given")

    def _load(self, name: str, module: str, origin: str) -> str:
        if self._manager.is_blocked(name):
            self.found.append(Found(name, origin, None, "disabled by the settings"))
            return "disabled by the settings"
        try:
            return self._register(importlib.import_module(module), name, origin)
        except Exception as error:  # noqa: BLE001 - a stranger's import may raise anything
            problem = f"{type(error).__name__}: {error}"
            self.found.append(Found(name, origin, None, problem))
            return problem

    def _register(self, plugin: object, name: str, origin: str) -> str:
        level = getattr(plugin, "wnodes_api", None)
        problem = "" if level in API_LEVELS else f"wnodes_api is {level!r}: want one of {API_LEVELS}"
        if not problem:
            try:
                self._manager.register(plugin, name)
                self._manager.check_pending()
            except Exception as error:  # noqa: BLE001 - pluggy validates the stranger's signatures
                problem = f"{type(error).__name__}: {error}"
                # pluggy keeps a half-registered plug-in (its own XXX says so): take it out.
                if self._manager.is_registered(plugin):
                    self._manager.unregister(plugin)
        self.found.append(Found(name, origin, level, problem))
        return problem

    def _scan(self) -> None:
        if not _mentioned(PLUGIN_GROUP):
            return
        from importlib.metadata import entry_points  # 10 to 40 ms of every VM's start: only where wanted

        for entry in entry_points(group=PLUGIN_GROUP):
            version = entry.dist.version if entry.dist else "?"
            self._load(entry.name, entry.module, f"{entry.dist.name if entry.dist else '?'} {version}")

    def _load_lrms(self, lrms: str) -> None:
        module = f"wnodes_{lrms}.plugin"
        if importlib.util.find_spec(f"wnodes_{lrms}") is None:
            from importlib.metadata import entry_points

            entry = next(iter(entry_points(group=LRMS_GROUP, name=lrms)), None)
            if entry is None:
                raise NoProvider(f"no adapter for LRMS {lrms!r}", hint=f"pip install wnodes-{lrms}")
            module = entry.module
        problem = self._load(lrms, module, "adapter")
        if problem:
            raise BrokenPlugin(f"adapter {lrms!r}: {problem}")

    def _trace(self) -> None:
        def before(hook_name: str, methods: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            who = ", ".join(m.plugin_name for m in reversed(methods)) or "nobody"
            print(f"wnodes: trace: {hook_name}({', '.join(kwargs)}) -> {who}", file=sys.stderr)

        def after(outcome: Any, hook_name: str, methods: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            shown = repr(outcome.exception or outcome.get_result())[:200]
            print(f"wnodes: trace: {hook_name} = {shown}", file=sys.stderr)

        self._manager.add_hookcall_monitoring(before, after)


def _mentioned(group: str) -> bool:
    """Whether any distribution on the path has entry points of ``group``, by PyPA's entry points specification.

    1 ms, where importlib.metadata takes 10 to 40 to say the same.
    """
    header = f"[{group}]".encode()
    for folder in sys.path:
        for metadata in glob.iglob(f"{glob.escape(folder)}/*.*-info/entry_points.txt"):
            with contextlib.suppress(OSError), open(metadata, "rb") as file:
                if header in file.read():
                    return True
    return False
