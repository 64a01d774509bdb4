"""Whose job is this client? Told by root from the process table, re-checked against pid reuse."""

from __future__ import annotations

import select
from typing import Any

from wnodes_core import processes
from wnodes_core.agent.protocol import Peer
from wnodes_core.errors import RequestError
from wnodes_core.model import Owner, Process

_TRIES = 5  # an ancestor may end, and its child be adopted, between two reads


def ancestry(peer: Peer) -> list[Process]:
    """The client and its parents, nearest first, all of them alive at one and the same moment.

    Raises RequestError if the client is gone or its family does not hold still.
    """
    for _ in range(_TRIES):
        chain = list(processes.ancestry(peer.pid, command_of_users=False))
        again = list(processes.ancestry(peer.pid, command_of_users=False))
        if _same(chain, again) and peer_alive(peer):
            return chain
        if not peer_alive(peer):
            break
    raise RequestError(f"process {peer.pid} ended while it asked for its VM")


def _same(one: list[Process], two: list[Process]) -> bool:
    return bool(one) and [(p.pid, p.started, p.parent, p.uid) for p in one] == [
        (p.pid, p.started, p.parent, p.uid) for p in two
    ]


def peer_alive(peer: Peer) -> bool:
    """Whether the very process that connected still runs."""
    if peer.pidfd < 0:
        return False
    poller = select.poll()
    poller.register(peer.pidfd, select.POLLIN)
    return not poller.poll(0)


def owner_of(peer: Peer, hook: Any) -> Owner:
    """The job that the client belongs to, by its ancestry to the batch system's daemon.

    Raises RequestError if it belongs to none.
    """
    chain = ancestry(peer)
    owner: Owner | None = hook.wnodes_lrms_owner(ancestry=chain)
    if owner is None:
        raise RequestError(f"process {peer.pid} does not descend from the batch system: it is in no job here")
    return owner
