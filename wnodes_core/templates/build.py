"""Building one template: boot a guest, bring it to rest, save it. A process of its own, with no job's rights.

``python -I -m wnodes_core.templates.build`` with ``{"plan": {…}, "id": …, "ways": […]}`` on stdin, as the account
that is to run the guest, in a folder of that account's. Its last act is ``made.json``. Killed at any point it
leaves a journal in that folder, by which everything else is undone (``wnodes_core.agent.undo``).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import asdict, replace
from typing import Any

from wnodes_core.errors import NoProvider, TransientError, WnodesError
from wnodes_core.files import write_atomic
from wnodes_core.guest import identity
from wnodes_core.images import disks
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle
from wnodes_core.model import Process, Shape, Template, Trace, Vm
from wnodes_core.plan import Plan
from wnodes_core.plugins import Plugins
from wnodes_core.templates.shelf import MADE

BLANK = "blank.qcow2"
REST_TIMEOUT_S = 300.0  # an ordinary cloud image is booted to its end first: 30 s under TCG after its agent answers
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


async def build(lifecycle: Lifecycle, template_id: str, way: str) -> Template:
    """Boot, rest, save. Raises WnodesError; what was made until then is in the folder's journal."""
    plan, hook = lifecycle.plan, lifecycle.hook

    def start(vm: Vm) -> Process:
        process: Process = hook.wnodes_template_start(vm=vm, way=way)
        return process

    running = await lifecycle.boot(start)
    told = await running.channel.rest(timeout_s=REST_TIMEOUT_S)
    # The channel stays connected: a guest whose host hung up would be saved as one that looks for another.
    made = await asyncio.to_thread(hook.wnodes_template_save, vm=running.vm, way=way)
    running.channel.close()
    vm = running.vm
    files = dict(made["files"])
    if vm.disks[0].format == "qcow2":
        await asyncio.to_thread(disks.blank_for, vm.disks[0].path, f"{plan.folder}/{BLANK}")
        files["blank"] = BLANK
    return Template(
        id=template_id,
        folder=plan.folder,
        way=way,
        image=plan.image.digest,
        accel=plan.accel,
        # A guest without the driver cannot grow: its clones have the template's memory, or are booted.
        shape=Shape(vm.cpus, vm.memory_mib, vm.most_mib if told.get("grows") else 0),
        memory=made["memory"],
        disks=vm.disks,
        files=files,
        mount_ports=plan.mount_ports,
        facts=dict(running.channel.facts),
        identity=identity.of(told),
    )


async def _first_that_works(plan: Plan, template_id: str, ways: list[str], hook: Any) -> Template:
    journal = Journal(f"{plan.folder}/journal")
    building = asyncio.current_task()
    assert building is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, building.cancel)
    for way in ways:
        lifecycle = Lifecycle(plan, journal, hook, Trace(), lambda text: print(text, file=sys.stderr))
        try:
            return await build(lifecycle, template_id, way)
        except asyncio.CancelledError:
            await asyncio.to_thread(lifecycle.stop)
            raise TransientError("told to end") from None
        except WnodesError as error:
            left = await asyncio.to_thread(lifecycle.stop)
            if way == ways[-1] or left:
                raise
            print(f"{way}: {error}", file=sys.stderr)
    raise NoProvider(f"no way to save a guest among {ways}: want mapped or saved")


def main() -> int:
    """Entry point; says on stderr what went wrong, as JSON in its last line."""
    given = json.load(sys.stdin)
    plan = replace(Plan.from_dict(given["plan"]), template=None)
    libc = ctypes.CDLL(None)
    # SIGTERM and not SIGKILL: whoever wanted this has gone, and the guest is taken down before we go too.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.umask(0o077)
    os.chdir(plan.folder)
    # libvirt looks for the caller's own folders, and an account such as nobody has none.
    os.environ.update({name: plan.folder for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")})
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s %(message)s")
    hook = Plugins(disabled=tuple(given.get("disabled", ()))).hook
    try:
        template = asyncio.run(_first_that_works(plan, given["id"], list(given["ways"]), hook))
    except (WnodesError, OSError) as error:
        told = error if isinstance(error, WnodesError) else TransientError(f"{type(error).__name__}: {error}")
        print(json.dumps(told.to_dict()), file=sys.stderr)
        return 1
    write_atomic(f"{plan.folder}/{MADE}", json.dumps(asdict(template)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
