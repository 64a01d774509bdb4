"""The daemon's real collaborators: settings, plug-ins, image store, policy, plan, probe."""

from __future__ import annotations

import json
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from wnodes_core import command, plan, plugins, policy, settings
from wnodes_core.agent.daemon import Parts
from wnodes_core.errors import CommandError, LibvirtDown
from wnodes_core.files import private_folder
from wnodes_core.images import User
from wnodes_core.images.layers import node_store
from wnodes_core.plugins import Plugins

# What a mount wants of a VM, or of root, follows from all providers that stand in its order.
_STORAGE = tuple(name for name in plugins.BUILTINS if ".storage." in name)
# The daemon brings images and asks batch systems; VMs, disks and gateways are the keepers', but what root must make.
BUILTINS = (
    "wnodes_core.images.sources",
    "wnodes_core.network.bridge",
    "wnodes_core.network.ovs",
    "wnodes_core.network.pci",
    "wnodes_core.storage.lvm",
    *_STORAGE,
)
BACKENDS = ("wnodes_core.backends.libvirt.plugin", *_STORAGE)  # asked about templates; it loads no libvirt for that
# Where a batch system's own commands find their site: from wnodesd's own environment, or the
# adapter's section of the settings (``environment: {SLURM_CONF: …}``).
LRMS_ENVIRONMENT = ("SLURM_CONF", "LSF_ENVDIR", "CONDOR_CONFIG")
PROBE_S = 180.0


class Hooks:
    """One plug-in manager a batch system, made when first asked for."""

    def __init__(self, disabled: tuple[str, ...]) -> None:
        self._disabled = disabled
        self._made: dict[str, Plugins] = {}
        self._lock = threading.Lock()

    def __call__(self, lrms: str) -> Any:
        """Pluggy's relay with that adapter loaded (without one for ''). Raises PluginError."""
        with self._lock:
            if lrms not in self._made:
                self._made[lrms] = Plugins(lrms=lrms, disabled=self._disabled, builtins=BUILTINS)
            return self._made[lrms].hook


def default_parts(config: str | None) -> Parts:
    """What ``wnodesd`` runs with. Raises SettingsError."""
    site = settings.load(config, trusted=True)
    hooks = Hooks(tuple(site.plugins.disabled))
    backends = cache(lambda: Plugins(disabled=tuple(site.plugins.disabled), builtins=BACKENDS).hook)

    def environ(lrms: str) -> dict[str, str]:
        given = site.lrms.get(lrms, {}).get("environment", {})
        return {**command.clean_environment(LRMS_ENVIRONMENT), **{str(k): str(v) for k, v in given.items()}}

    return Parts(
        settings=site,
        hook_for=hooks,
        admit=policy.admit,
        store=node_store(site, hooks("")),
        make_plan=plan.make,
        check_size=plan.guest_memory_mib,
        probe=lambda: probe(site.accel, site.state_dir, tuple(site.plugins.disabled)),
        person=User.of,
        reload=lambda: settings.load(config, trusted=True),
        backend=backends,
        environ=environ,
    )


def probe(accel: str, state_dir: str, disabled: tuple[str, ...] = ()) -> dict[str, Any]:
    """What this host can run: ``{"accel": …}`` or ``{"error": …}``; blocks for a second.

    Asked at each start of wnodesd and not remembered: QEMU or the rights on its device may have
    changed. What is dear to find out the backend remembers itself.
    """
    folder = private_folder(Path(state_dir, "probe"))
    argv = [sys.executable, "-I", "-m", "wnodes_core.agent.probe", accel, os.fspath(folder), *disabled]
    try:
        done = command.run(argv, timeout_s=PROBE_S)
        answer: dict[str, Any] = json.loads(done.stdout)
    except (CommandError, ValueError) as error:
        return {"error": LibvirtDown(f"the probe of the hypervisor failed: {error}", hint="wnodes doctor").to_dict()}
    return answer
