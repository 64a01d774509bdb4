"""The keeper's own side of the protocol (``keeper_lease``) against a real wnodesd, over a kill -9 of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from wnodesd_harness import node_fixture, python_fixture, until  # noqa: E402, F401 - fixtures

KEEPER = """
import asyncio, sys
from wnodes_core.keeper_lease import Holding

async def main(holding):
    ended = asyncio.get_running_loop().create_future()
    holding.start(ended.set_result)
    holding.tell({"event": "state", "state": "running", "trace": [["boot", 0.5, 2.5]], "start": {"kind": "warm"}})
    print("ended:", await ended, flush=True)
    await holding.finish({"event": "state", "state": "gone", "trace": [["boot", 0.5, 2.5]]})

holding = Holding(*sys.argv[1:])
holding.claim()
asyncio.run(main(holding))
"""


def test_the_keepers_holding_is_granted_survives_a_daemon_and_is_told_the_end(node):
    node.start()
    lease = node.prepare(uid=0, gid=0)  # root's own job, so that the keeper may use our environment
    step = node.step()
    step.launch(how="stay", uid=0)
    start = step.next()
    argv = [sys.executable, "-I", "-c", KEEPER, node.socket, lease, start["reply"]["token"]]
    keeper = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        until(lambda: node.leases()[0]["keeper_state"] == "running", "the keeper holds")
        node.kill()
        node.start()
        until(lambda: node.leases()[0]["keeper_state"] == "running", "the keeper is back")
        assert node.leases()[0]["keeper_pid"] == keeper.pid
        assert ["boot", 0.5, 2.5] in node.leases()[0]["trace"]
        assert node.leases()[0]["start"]["kind"] == "warm"
        assert node.finish() == {"ok": True, "pending": False}
        assert keeper.communicate(timeout=15)[0] == b"ended: the job is over\n"
        assert keeper.returncode == 0
        assert node.left() == []
    finally:
        keeper.kill()
        keeper.wait()
        os.kill(start["pid"], signal.SIGKILL)  # it pauses for ever, so it is still the same process
