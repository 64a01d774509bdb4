"""The enemy's half of the network contract: guest root may send what it likes, and the node lets pass what it may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest

from wnodes_core.api import Nic, Port
from wnodes_core.testing import forbidden
from wnodes_core.testing.frames import BROADCAST, Seen, arp, came, ping, tcp, udp
from wnodes_core.testing.network import Made, NetworkContract
from wnodes_core.testing.network_node import NetworkNode
from wnodes_core.testing.wires import QUIET_S, Tap, Wiretap

SIX = "fd00:1::1:10"
_QUICK_S = 0.03
_CLOSED = {
    "10.1.0.1": True, "192.0.2.9": True, "192.0.2.16": False, "10.2.0.1": False, "198.51.100.1": False,
    "255.255.255.255": False, "224.0.0.251": False,
}  # fmt: skip


@dataclass
class Evil:
    """A guest that means harm: its port, its end of it, and where what it sends may come out."""

    port: Port
    nic: Nic
    tap: Tap
    ears: dict[str, Wiretap | Tap]

    @property
    def ip(self) -> str:
        """Its address in the network."""
        return self.port.addresses[0].partition("/")[0]

    @property
    def node_mac(self) -> str:
        """The MAC of its node."""
        return self.nic.neighbours[0][1]

    def heard(self, quiet_s: float = _QUICK_S) -> dict[str, list[bytes]]:
        """What has come out since, where."""
        found = {where: ear.frames(quiet_s) for where, ear in self.ears.items()}
        found["back"] = self.tap.frames(0.01)
        return {where: frames for where, frames in found.items() if frames}

    def passed(self, *frames: bytes) -> list[str]:
        """Where all of these frames came out."""
        return self.passed_of({"": frames}).get("", [])

    def passed_of(self, tries: Mapping[str, Sequence[bytes]], quiet_s: float = _QUICK_S) -> dict[str, list[str]]:
        """Where all frames of a try came out, by the try; all are sent at once."""
        for frame in chain(*tries.values()):
            self.tap.send(frame)
        heard = self.heard(quiet_s).items()
        found = {
            what: [where for where, taken in heard if all(came(taken, frame) for frame in frames)]
            for what, frames in tries.items()
        }
        return {what: places for what, places in found.items() if places}


class NetworkFramesContract(NetworkContract):
    """All of ``NetworkContract``, and what a guest's frames may and may not do."""

    @pytest.fixture
    def evil(self, node: NetworkNode, attach: Made) -> Iterator[Callable[..., Evil]]:
        """A guest, another beside it, and ears at the cable and at the node."""
        with ExitStack() as stack:

            def begin(**more: Any) -> Evil:
                port, nic = attach(**more)
                near, _ = attach("near", 11, taken=(port,))
                ears: dict[str, Wiretap | Tap] = {"wire": node.listen(), "near": node.guest(near)}
                ears["node"] = node.listen(node.inside(port))
                made = Evil(port, nic, node.guest(port), ears)
                for each in (made.tap, *ears.values()):
                    stack.callback(each.close)
                hello, deadline = udp(port.mac, BROADCAST, made.ip, "10.1.1.99"), time.monotonic() + 5
                while not {"wire", "near"} <= set(made.passed(hello)):
                    assert time.monotonic() < deadline, "the measure does not work"
                made.heard(QUIET_S)
                return made

            yield begin

    def test_what_it_may_not_send_gets_nowhere(self, evil: Callable[..., Evil]) -> None:
        guest, got = evil(), {}
        tries = forbidden.forbidden(guest.port)
        for frame in tries.values():
            guest.tap.send(frame)
        if guest.heard(QUIET_S):  # then which?
            for what, frame in tries.items():
                guest.tap.send(frame)
                got[what] = guest.heard()
        assert {what: seen for what, seen in got.items() if seen} == {}
        assert guest.passed_of(forbidden.in_pieces(guest.port), QUIET_S) == {}

    def test_of_ipv6_what_it_may_not_send_gets_nowhere(self, evil: Callable[..., Evil]) -> None:
        guest = evil(addresses=("10.1.1.10/16", f"{SIX}/64"))
        allowed = {what: [frame] for what, frame in forbidden.allowed6(guest.port, SIX).items()}
        passed = guest.passed_of(allowed, QUIET_S)
        assert {what: {"wire", "near"} - set(passed.get(what, ())) for what in allowed} == dict.fromkeys(allowed, set())
        assert guest.passed_of(dict(forbidden.forbidden6(guest.port, SIX)), QUIET_S) == {}

    def test_of_the_node_it_gets_what_the_site_names_and_no_word_leaves_the_machine(
        self, evil: Callable[..., Evil]
    ) -> None:
        guest = evil()
        ends = (guest.port.mac, guest.node_mac, guest.port.local, guest.port.node)
        for frame in (arp(ends[0], ends[2], ends[3]), ping(*ends), tcp(*ends, 2049)):
            guest.tap.send(frame)
            assert [Seen.of(each).source for each in guest.tap.frames()] == [guest.node_mac]
        assert [each for each in guest.ears["wire"].frames() if Seen.of(each).kind in (0x800, 0x806)] == []
        guest.heard()
        asked = {"SYN": [tcp(*ends, 22)], **forbidden.to_the_node_in_pieces(guest.port, guest.node_mac, 22)}
        for what, frames in asked.items():
            for frame in frames:
                guest.tap.send(frame)
            seen = guest.heard()
            assert "back" not in seen and "wire" not in seen, what
            assert len(seen.get("node", ())) < len(frames), what

    def test_a_closed_network_reaches_itself_and_what_is_allowed(self, evil: Callable[..., Evil]) -> None:
        guest = evil(closed=True, allow=("10.1.0.0/16", "192.0.2.0/28"))
        tries = {each: [udp(guest.port.mac, BROADCAST, guest.ip, each)] for each in _CLOSED}
        passed = guest.passed_of(tries, QUIET_S)
        assert {each: "wire" in passed.get(each, ()) for each in _CLOSED} == _CLOSED
