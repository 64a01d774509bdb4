"""VMs of an ordinary user's that have mounts as devices, for the storage contract."""

from __future__ import annotations

import pwd
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from netns_kit import Namespace
from network_guests import RealGuest

from wnodes_core.guest.channel import Done
from wnodes_core.model import Image, Mount


class Served:
    """A guest as the contract asks for one, its VM started by the real lifecycle; it has no NIC."""

    def __init__(self, real: RealGuest) -> None:
        self.real = real

    def run(self, argv: Sequence[str] | str, **more: Any) -> Done:
        """As ``GuestChannel.run``; text is a bash script."""
        return self.real.ask(argv, **more)


@contextmanager
def booted(image: Image, user: pwd.struct_passwd, mounts: tuple[Mount, ...], provider: str) -> Iterator[Served]:
    """One, until the end of the context; then nothing of it may be left."""
    guest = RealGuest(Namespace(), user, image, None, None, mounts=mounts, storage=(provider, "sshfs"))
    try:
        guest.wait()
        yield Served(guest)
    finally:
        left = guest.close()
    assert left == []
