"""Contract suites that plug-in authors inherit in their own tests (docs/contract.md).

::

    from wnodes_core.testing import LrmsContract

    class TestMine(LrmsContract):
        lrms = "mine"

The pytest plug-in ``wnodes_core.testing.plugin`` comes with the package and needs no setting.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wnodes_core.testing.backend import BackendContract
    from wnodes_core.testing.calls import Answer, Call, Facts, Live, Outcome, TaskCall
    from wnodes_core.testing.image import ImageContract
    from wnodes_core.testing.lrms import LrmsContract
    from wnodes_core.testing.network import NetworkContract
    from wnodes_core.testing.network_frames import NetworkFramesContract
    from wnodes_core.testing.network_node import NetworkNode
    from wnodes_core.testing.policy import PolicyContract
    from wnodes_core.testing.stage import public_copy
    from wnodes_core.testing.storage import StorageContract
    from wnodes_core.testing.template import TemplateContract

_HOMES = {
    "Answer": "calls",
    "BackendContract": "backend",
    "Call": "calls",
    "Facts": "calls",
    "ImageContract": "image",
    "Live": "calls",
    "LrmsContract": "lrms",
    "NetworkContract": "network",
    "NetworkFramesContract": "network_frames",
    "NetworkNode": "network_node",
    "Outcome": "calls",
    "PolicyContract": "policy",
    "StorageContract": "storage",
    "TaskCall": "calls",
    "TemplateContract": "template",
    "public_copy": "stage",
}

__all__ = [
    "Answer",
    "BackendContract",
    "Call",
    "Facts",
    "ImageContract",
    "Live",
    "LrmsContract",
    "NetworkContract",
    "NetworkFramesContract",
    "NetworkNode",
    "Outcome",
    "PolicyContract",
    "StorageContract",
    "TaskCall",
    "TemplateContract",
    "public_copy",
]


def __getattr__(name: str) -> Any:
    """A suite when it is asked for: ``hookpython`` lives in this package and may not load pytest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
