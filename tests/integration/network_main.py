"""A lease's way up and down without a keeper around it: ``network_main.py PLAN.json``, as the job's user.

Says ``{"up": seconds per phase}``, then runs each JSON list that comes on stdin as guest root and says how it
ended; or each object, the arguments of ``GuestChannel.run``, whose output is said byte by byte (Latin-1). At the end of stdin all is undone, and what could not be is said.
"""

import asyncio
import json
import sys
from pathlib import Path

from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle
from wnodes_core.model import Trace
from wnodes_core.plan import Plan
from wnodes_core.plugins import Plugins


def say(**facts):
    print(json.dumps(facts), flush=True)


async def live(lifecycle, trace):
    running = await lifecycle.start()
    say(up={step.name: step.seconds for step in trace.steps})
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        exact = isinstance(asked, dict)
        done = await running.channel.run(**{"timeout_s": 30, **(asked if exact else {"argv": asked})})
        code = ("latin-1",) if exact else ("utf-8", "replace")
        say(code=done.code, out=done.stdout.decode(*code), err=done.stderr.decode(*code))
    running.channel.close()


def main():
    plan = Plan.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    trace, journal = Trace(), Journal(f"{plan.folder}/journal")
    lifecycle = Lifecycle(plan, journal, Plugins(scan=False).hook, trace, lambda text: None)
    try:
        asyncio.run(live(lifecycle, trace))
    finally:
        errors = lifecycle.stop()
        journal.close()
        say(left=[str(error) for error in errors])


if __name__ == "__main__":
    main()
