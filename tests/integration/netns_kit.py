"""The tests' wires and frames, which come with the package so that strangers have them too."""

from wnodes_core.testing.frames import BROADCAST, Seen, arp, came, ether, ipv4, ipv6, ping, tcp, udp
from wnodes_core.testing.wires import QUIET_S, Namespace, Tap, Wiretap, inside, veth

__all__ = [
    "BROADCAST", "QUIET_S", "Namespace", "Seen", "Tap", "Wiretap", "arp", "came", "ether", "inside", "ipv4", "ipv6", "ping", "tcp", "udp", "veth",
]  # fmt: skip
