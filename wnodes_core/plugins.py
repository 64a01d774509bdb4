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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

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
    "wnodes_core.storage.sshfs_tcp",
    "wnodes_core.storage.virtiofs",
    "wnodes_core.storage.ninep",
    "wnodes_core.storage.nfs",
    "wnodes_core.network.user",
)
LRMS_GROUP = "wnodes.lrms"
PLUGIN_GROUP = "wnodes.plugins"
API_LEVELS = (1,)
_trace_stream: TextIO | None = None  # where a trace goes if not to stderr


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
        self._tracing = os.environ.get("WNODES_TRACE") == "1"
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
        if self._tracing:
            self._manager.add_hookcall_monitoring(_say_if_nobody, lambda *_: None)

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
                self._check_defaults(plugin)
                if self._tracing:
                    self._trace(plugin, name)
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

    def _hooks_of(self, plugin: object) -> list[Any]:
        callers = self._manager.get_hookcallers(plugin) or []
        return [impl for caller in callers for impl in caller.get_hookimpls() if impl.plugin is plugin]

    def _check_defaults(self, plugin: object) -> None:
        for impl in self._hooks_of(plugin):
            if impl.kwargnames:
                names = ", ".join(impl.kwargnames)
                raise TypeError(f"{impl.function.__name__}: {names} has a default, so it would never be passed")

    def _trace(self, plugin: object, name: str) -> None:
        for impl in self._hooks_of(plugin):
            impl.function = _traced(impl.function, name)


def keep_trace_stream() -> None:
    """Let traces go on to what is stderr now, though stderr will be something else."""
    global _trace_stream
    if os.environ.get("WNODES_TRACE") == "1":
        _trace_stream = os.fdopen(os.dup(2), "w", buffering=1)


def _traced(function: Callable[..., Any], who: str) -> Callable[..., Any]:
    """The function, telling of each call who was asked, what came of it and how long it took."""
    name = function.__name__

    def traced(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            result = function(*arguments)
        except BaseException as error:
            _tell(f"{name} by {who}: {error!r:.200}", began)
            raise
        _tell(f"{name} by {who}: {result!r:.200}", began)
        return result

    return traced


def _say_if_nobody(hook_name: str, methods: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not methods:
        _tell(f"{hook_name} by nobody: None", time.perf_counter())


def _tell(text: str, began: float) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reads it may have gone
        print(
            f"wnodes: trace: {text} in {(time.perf_counter() - began) * 1e3:.2f} ms", file=_trace_stream or sys.stderr
        )


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
