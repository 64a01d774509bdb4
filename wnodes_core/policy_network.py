"""The policy's word on a request's network: which, whether, where, how fast."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from wnodes_core.errors import BadRequest, LimitExceeded, NetworkDenied, NetworkNotHere, UnknownNetwork
from wnodes_core.model import Job, VmRequest
from wnodes_core.settings.network import BUILT_IN, NetworkSettings
from wnodes_core.settings.schema import Rule


def admitted(request: VmRequest, job: Job, rule: Rule, networks: NetworkSettings) -> VmRequest:
    """The request with its network named, if this job may have it on this node.

    Unlike images and mounts, networks are closed where the policy is silent: being in one is a right.

    Raises UnknownNetwork, NetworkDenied, NetworkNotHere (a REQUEUE: another node may carry it), LimitExceeded.
    """
    name = request.network or rule.default_network or "none"
    allowed = BUILT_IN if rule.networks is None else (*rule.networks, "none", rule.default_network)
    network = networks.find(name)
    if not any(fnmatchcase(name, pattern) for pattern in allowed):
        shown = ", ".join(dict.fromkeys(pattern for pattern in allowed if pattern))
        raise NetworkDenied(f"network {name!r} is not allowed for you here: want one of {shown}")
    if network is None and name not in BUILT_IN:
        shown = ", ".join((*BUILT_IN, *networks.here(job.node)))
        raise UnknownNetwork(f"network {name!r}: no such network on this node: want one of {shown}")
    if network is not None and not network.carried_by(job.node):
        raise NetworkNotHere(f"network {name!r} is confined to other nodes than {job.node!r}")
    most = network.rate_mbit if network else 0
    if request.rate_mbit and name in BUILT_IN:
        raise BadRequest(f"rate {request.rate_mbit} Mbit/s: network {name!r} has no limit to set")
    if request.rate_mbit and most and request.rate_mbit > most:
        raise LimitExceeded(f"rate {request.rate_mbit} Mbit/s asked for, network {name!r} allows {most}")
    return replace(request, network="" if name == "none" else name)
