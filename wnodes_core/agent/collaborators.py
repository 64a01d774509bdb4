"""What the daemon is given and does not make itself: settings, hooks, policy, store, probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wnodes_core import policy_become
from wnodes_core.command import PATH
from wnodes_core.journal import Journal
from wnodes_core.model import VmRequest
from wnodes_core.plugins import Plugins


@dataclass
class Parts:
    """The daemon's collaborators, given to it; ``server.default_parts`` makes the real ones."""

    settings: Any
    hook_for: Callable[[str], Any]
    admit: Callable[..., VmRequest]
    store: Any
    make_plan: Callable[..., dict[str, Any]]
    probe: Callable[[], dict[str, Any]]
    person: Callable[[int], Any]  # the image store's view of a uid
    # Raises LimitExceeded for a job too small for its VM: (request, job, settings, accel).
    check_size: Callable[..., object] = field(default=lambda *facts: None)
    sanctioned: Callable[..., policy_become.Account] = field(default=policy_become.sanctioned)
    reload: Callable[[], Any] | None = None
    backend: Callable[[], Any] = field(default=lambda: Plugins(builtins=()).hook)  # asked about templates only
    journal: type[Journal] = Journal
    environ: Callable[[str], dict[str, str]] = field(default=lambda lrms: {"PATH": PATH})
    end_grace_s: float = 15.0  # for the keeper to stop its VM before we do
    hold_timeout_s: float = 60.0  # from election to the keeper's claim
    retry_s: float = 5.0  # first pause before an undo is tried again; doubles, up to ten minutes
