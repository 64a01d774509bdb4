"""Passing a guest's channel from one process to another, between two frames."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

from wnodes_core.errors import ChannelLost
from wnodes_core.guest.channel import GuestChannel

# Above every stream that the first holder has used: a late frame of its is then nobody's.
_FIRST_STREAM = 1 << 16


def release(channel: GuestChannel) -> socket.socket:
    """The channel's connection, for another to go on with; the channel is closed, the guest sees nothing of it.

    Raises ChannelLost if the guest has gone, or is in the middle of a frame.
    """
    if channel.lost.done():
        raise channel.lost.result()
    if channel._transport is None or not channel._parser.between_frames:
        channel.close()
        raise ChannelLost("guest channel: it cannot be passed on in the middle of a frame")
    port: socket.socket = channel._transport.get_extra_info("socket").dup()
    channel.close()
    return port


async def go_on(port: socket.socket, facts: Mapping[str, Any]) -> GuestChannel:
    """The channel of a guest whose agent runs and is between two frames; ``facts`` as it told them before."""
    channel = GuestChannel.of_running(_FIRST_STREAM)
    port.setblocking(False)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: channel, port)
    channel.facts = dict(facts)
    return channel
