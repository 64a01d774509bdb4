"""A worker node for the network contract: a namespace with a cable, and ports as wnodesd hands them out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from wnodes_core.api import Port, mac_of
from wnodes_core.network.links import links
from wnodes_core.testing.wires import Namespace, Tap, Wiretap, veth
from wnodes_core.tools import run

NODE, UPLINK, FAR = "169.254.77.1", "eth1", "far1"
_STEPS = ("subprocess.Popen", "os.chown", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.symlink", "open")


class NetworkNode:
    """Override what is otherwise with your provider: ``port``, ``state``, ``pieces``, ``occupy``, ``inside``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.space, self.wire = Namespace(), Namespace()
        self.wire.quiet("all", "default")
        veth(self.space, UPLINK, self.wire, FAR)
        self.space.quiet(UPLINK)

    def port(self, lease: str = "one", host: int = 10, **more: Any) -> Port:
        """What wnodesd asks ``wnodes_port_allot`` with; ``host`` is the last byte of its addresses."""
        port = Port(
            lease, "lan", self.kind, 12345, mac=mac_of(lease), uplink=UPLINK, addresses=(f"10.1.1.{host}/16",),
            gateways=("10.1.0.1",), dns=("10.1.0.53",), node=NODE, local=f"169.254.80.{host}", node_ports=(2049,),
            allow=("10.1.0.0/16",),
        )  # fmt: skip
        return replace(port, **more)

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Call a hook on this node."""
        return self.space.run(function, **arguments)

    def state(self) -> list[str]:
        """All that a provider may have changed: devices, rules, addresses, routes, neighbours. Sorted."""
        return self.space.run(_state)  # type: ignore[no-any-return]

    def pieces(self, port: Port) -> dict[str, Callable[[], object]]:
        """How a stranger removes each piece of an attached port, by the piece's name."""
        return {
            "tap": lambda: self.space.sh("ip", "link", "del", port.device),
            "rules": lambda: self.space.sh("nft", "flush", "ruleset"),
        }

    def occupy(self, port: Port) -> Callable[[], object] | None:
        """Make a stranger's device of the port's name; returns what removes it. None: a port has no such name."""
        self.space.sh("ip", "link", "add", port.device, "type", "bridge")
        return lambda: self.space.sh("ip", "link", "del", port.device)

    def inside(self, port: Port) -> str:
        """The device at which the node itself hears the guests of a port's network."""
        raise NotImplementedError

    def guest(self, port: Port) -> Tap:
        """The guest's end of an attached port."""
        return Tap(self.space, port.device)

    def listen(self, device: str = "") -> Wiretap:
        """All that passes a device of the node; without one, all that leaves it by the cable."""
        return Wiretap(self.space, device) if device else Wiretap(self.wire, FAR)

    def close(self) -> None:
        """All of it is gone."""
        self.space.close()
        self.wire.close()


def _state() -> list[str]:
    found = [f"device {each.name} of {each.master or 'none'} {each.alias}" for each in links().values()]
    found += [f"rules {line}" for line in run(["nft", "list", "tables"]).text.splitlines()]
    for words in (["addr"], ["route", "show", "table", "all"], ["neigh", "show", "nud", "permanent"]):
        found += [f"{words[0]} {line.strip()}" for line in run(["ip", "-o", *words]).text.splitlines()]
    return sorted(_without_number(each) for each in found)


def _without_number(line: str) -> str:
    """A device made again has another number."""
    head, colon, rest = line.partition(": ")
    return f"{head.partition(' ')[0]} {rest}" if colon and head.startswith("addr ") else line


def elsewhere(function: Callable[[], Any], *, dies_at: int = 0) -> bool | None:
    """Whether a function returned True in a process of its own; None if that process is dead.

    It gets SIGKILL just before its step ``dies_at``: a program that it starts, a file that it changes.
    """
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            if dies_at:
                sys.addaudithook(_Deadly(dies_at))
            os._exit(0 if function() else 1)
        os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1, -signal.SIGKILL), f"exit code {code}: the function raised"
    return None if code < 0 else code == 0


class _Deadly:
    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _STEPS or (event == "open" and not _changes(*arguments)):
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


def _changes(path: object, mode: object, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and path not in (os.devnull, "/dev/net/tun")
