"""Ending a slot: everything that runs under its account, which is nobody else's."""

from __future__ import annotations

from wnodes_core import processes


def end_all_of(uid: int) -> bool:
    """End every process of a slot's account; whether that came to an end. Blocks; for root."""
    for _ in range(5):  # what is being born while we look is found by the next look
        found = [each for each in processes.table(command_of_users=False) if each.uid == uid and processes.alive(each)]
        if not found:
            return True
        if not all([processes.kill(each) for each in found]):
            return False
    return False
