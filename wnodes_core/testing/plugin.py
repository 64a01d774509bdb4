"""The pytest plug-in: found by pytest itself once wnodes is installed, it makes our suites' asserts speak.

It must not import a suite: pytest rewrites only what is imported after it was named here.
"""

from __future__ import annotations

import pytest

from wnodes_core import __version__
from wnodes_core.plugins import API_LEVELS

_SUITES = (
    *("backend", "image", "lrms", "lrms_hooks", "lrms_scripts", "lrms_task"),
    *("network", "network_frames", "policy", "storage"),
)
pytest.register_assert_rewrite(*(f"wnodes_core.testing.{name}" for name in _SUITES))


def pytest_report_header() -> str:
    """Which contract the run was held against."""
    return f"wnodes: {__version__}, API level {', '.join(map(str, API_LEVELS))}"
