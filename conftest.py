"""What two workers of one run share out: whole guests and real batch systems keep to one of them each."""

from __future__ import annotations

import pytest

# Two emulated guests at once starve each other on two CPUs, so all that boot one are one group; what starts a batch
# system without guests is another, for the clusters that its tests share. Anything else goes to whoever is free.
GROUPS = {"guests": {"guest"}, "daemons": {"slurm", "condor", "lsf"}}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist (``--dist loadgroup``) which tests one worker must run."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        group = next((name for name, wanted in GROUPS.items() if marks & wanted), None)
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
