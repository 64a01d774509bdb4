"""The five phases of a VM job, in core's words. Adapters translate them to their LRMS."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """When in a job's life a hook runs."""

    SUBMIT = "submit"  # parse and validate, refuse while the user watches
    PREPARE = "prepare"  # warn the node: image into the cache
    LAUNCH = "launch"  # become the job: lease, VM, mounts, run, relay, exit code
    FINISH = "finish"  # release early
    ADVERTISE = "advertise"  # free capacity and cached images as matchable resources
