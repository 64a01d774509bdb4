"""The ports of this node's leases: what each is allotted, made and removed, in wnodesd and nowhere else.

Addresses and VLANs come from what the node owns, so nobody else is asked. What is taken is known from the leases'
journals, also after a restart.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from wnodes_core.agent.leases import Lease
from wnodes_core.errors import HostBusy, TransientError, WnodesError
from wnodes_core.journal import Resource
from wnodes_core.ports import Port
from wnodes_core.settings.network import NetworkRule, NetworkSettings, span_of

log = logging.getLogger("wnodesd")
KIND = "port"  # of the resource in a lease's journal


class Ports:
    """One a node. All of it blocks.

    One port of a kind is made or removed at a time, for bridges are shared; a kind that hangs holds up no other.
    """

    def __init__(self, settings: Callable[[], NetworkSettings], hook: Callable[[], Any]) -> None:
        self._settings = settings
        self._hook = hook
        self._lock = threading.Lock()  # of what is allotted; held for moments only
        self._kinds: dict[str, threading.Lock] = {}
        self._taken: dict[str, Port] = {}  # by lease
        self._last: dict[str, int] = {}  # the address last given from each span

    def adopt(self, lease: Lease) -> None:
        """Know the port that an earlier wnodesd made for a lease."""
        for resource in lease.journal.open_resources:
            if resource.kind == KIND:
                self._taken[lease.id] = Port.from_dict(resource.data)

    def attach(self, lease: Lease, own: Sequence[int] = ()) -> dict[str, Any]:
        """Make the port of a lease, journalled: what of it belongs in the plan.

        ``own`` are the TCP ports of the node that are for this VM, 0 for one that nobody has. The same again
        for a lease that has it. Raises WnodesError; what was made until then the undo removes.
        """
        request = lease.request
        wanted = self._settings().port_for(request.network, request.rate_mbit, lease.id, lease.job.uid)
        if wanted is None:
            return {}
        with self._lock:
            port = self._taken.get(lease.id) or self._allotted(wanted, own)
            if port is None:  # nothing for root to do
                return {"port": wanted.to_dict()}
            resource = lease.journal.making(KIND, port.device, **port.to_dict())
            self._taken[lease.id] = port
        with self._one_of(port):
            if lease.id not in self._taken:
                raise TransientError(f"network {port.network!r}: the lease ended before its port was made")
            try:
                nic = self._hook().wnodes_port_attach(port=port)
            except OSError as error:
                raise TransientError(f"network {port.network!r}: {error}") from error
            lease.journal.made(resource)
        return {"port": port.to_dict(), "nic": nic.to_dict()}

    def detach(self, resource: Resource) -> None:
        """Undo a port of a journal; idempotent. Raises WnodesError if something of it is left."""
        port = Port.from_dict(resource.data)
        with self._one_of(port):
            if not self._hook().wnodes_port_detach(port=port):
                raise WnodesError(f"network {port.network!r}: no plug-in knows how to remove a {port.kind!r} port")
            self._taken.pop(port.lease, None)

    def mend(self) -> None:
        """Make again what others have removed of the ports of this node: a bridge, rules."""
        for lease, port in list(self._taken.items()):
            with self._one_of(port):
                if lease not in self._taken:
                    continue
                try:
                    self._hook().wnodes_port_attach(port=port)
                except (WnodesError, OSError) as error:
                    log.error("port: %s", error, extra={"event": "port", "lease": lease})

    def _one_of(self, port: Port) -> threading.Lock:
        return self._kinds.setdefault(port.kind, threading.Lock())

    def _allotted(self, wanted: Port, own: Sequence[int]) -> Port | None:
        settings = self._settings()
        rule = settings.find(wanted.network)
        taken = list(self._taken.values())
        port = self._with_addresses(wanted, rule, settings, taken) if rule else wanted
        if port.node:
            port = replace(port, own_ports=tuple(_free_ports(own, settings.gateway_ports, taken)))
        allotted: Port | None = self._hook().wnodes_port_allot(port=port, taken=taken)
        return allotted

    def _with_addresses(self, port: Port, rule: NetworkRule, settings: NetworkSettings, taken: list[Port]) -> Port:
        used = {each.partition("/")[0] for other in taken for each in (*other.addresses, other.local)}
        addresses = tuple(self._next(span, used, rule) + f"/{_length(span, rule)}" for span in _four_first(rule.range))
        return replace(
            port,
            vlan=_vlan(rule, [other for other in taken if other.network == rule.name]),
            addresses=addresses,
            node=settings.node_address,
            local=self._next(settings.node_range, used, rule),
            node_ports=settings.node_ports,
        )

    def _next(self, span: str, used: set[str], rule: NetworkRule) -> str:
        """The next free address after the one given last: one just given back rests for as long as can be."""
        first, last = (int(end) for end in span_of(span))
        version = span_of(span)[0].version
        make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        start = self._last.get(span, first - 1)
        for number in _around(first, last, start, len(used) + 1):
            if str(make(number)) not in used:
                self._last[span] = number
                return str(make(number))
        raise HostBusy(f"network {rule.name!r}: all of {span} is in use on this node")


def _free_ports(wanted: Sequence[int], span: str, taken: Iterable[Port]) -> Iterator[int]:
    """Each of ``wanted``, for a 0 one of the span that no lease has and nobody listens on; fewer if there are not."""
    used = {number for port in taken for number in port.own_ports}
    first, last = map(int, span.split("-"))
    free = (number for number in range(first, last + 1) if number not in used and _can_listen(number))
    for number in wanted:
        found = number or next(free, None)
        if found is None:
            log.warning("gateways: all ports of %s are in use", span, extra={"event": "port"})
            return
        yield found


def _can_listen(number: int) -> bool:
    try:
        with socket.create_server(("", number), family=socket.AF_INET):
            return True
    except OSError:
        return False


def _around(first: int, last: int, start: int, most: int) -> Iterator[int]:
    """Numbers after ``start``, then from the beginning; at most ``most``, of which one must be free."""
    size = last - first + 1
    return (first + (start + 1 - first + step) % size for step in range(min(size, most)))


def _four_first(spans: Iterable[str]) -> list[str]:
    return sorted(spans, key=lambda span: ":" in span)


def _length(span: str, rule: NetworkRule) -> int:
    """Prefix length of the subnet that a span of addresses lies in."""
    inside = [network for each in rule.subnet if span_of(span)[0] in (network := ipaddress.ip_network(each))]
    return max(network.prefixlen for network in inside)


def _vlan(rule: NetworkRule, taken: list[Port]) -> int:
    """The network's VLAN; of a span the first that no other lease has. Raises HostBusy."""
    if len(rule.vlans) == 1:
        return rule.vlans[0]
    used = {port.vlan for port in taken}
    free = next((vlan for vlan in rule.vlans if vlan not in used), None)
    if free is None:
        raise HostBusy(f"network {rule.name!r}: all VLANs {rule.vlan} are in use on this node")
    return free
