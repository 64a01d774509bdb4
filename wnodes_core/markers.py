"""The two pluggy markers of the project, ``hookspec`` and ``hookimpl``."""

from __future__ import annotations

import pluggy

PROJECT = "wnodes"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
