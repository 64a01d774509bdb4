"""Both backends keep the same contract."""

from __future__ import annotations

import pytest

from wnodes_core.testing.backend import BackendContract


class TestFake(BackendContract):
    backend = "wnodes_core.backends.fake"


@pytest.mark.guest
class TestLibvirt(BackendContract):
    backend = "wnodes_core.backends.libvirt.plugin"
