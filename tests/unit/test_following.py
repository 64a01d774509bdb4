"""A VM stands still while its launcher is stopped, and goes on with it."""

import asyncio
import os
import signal
import subprocess

from wnodes_core import following
from wnodes_core.errors import WnodesError


def test_the_vm_is_paused_while_the_launcher_is_stopped_and_only_then(monkeypatch):
    monkeypatch.setattr(following, "CHECK_S", 0.01)
    heard = []

    async def pause(paused):
        heard.append(paused)
        if len(heard) == 1:
            raise WnodesError("no VM yet")

    async def live(pid):
        task = asyncio.ensure_future(following.stops(pid, pause))
        await asyncio.sleep(0.1)
        assert heard == []
        os.kill(pid, signal.SIGSTOP)
        while len(heard) < 3:
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
        while heard[-1]:
            await asyncio.sleep(0.01)
        told = len(heard)
        await asyncio.sleep(0.1)
        assert heard == [True] * (told - 1) + [False]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            asyncio.run(asyncio.wait_for(live(process.pid), 20))
        finally:
            process.kill()
    assert not following.stopped(process.pid)
