"""The processes of ``TemplateContract``: one builds a template, others start clones and wait for orders.

``python -m wnodes_core.testing.template_helper BACKEND JSON`` prints one line of JSON: what it made, or the error.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import sys
from dataclasses import asdict
from typing import Any

from wnodes_core.api import Disk, Nic, Shape, Template, Vm, errors
from wnodes_core.guest import identity
from wnodes_core.guest.channel import GuestChannel
from wnodes_core.plan import vm_from_dict

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_BOOT_S = 120.0


async def build(hooks: Any, way: str, vm: Vm) -> Template:
    """Boot, rest, save, as ``wnodes_core.templates.build`` does."""
    hooks.wnodes_template_start(vm=vm, way=way)
    channel = await GuestChannel.connect(vm.channels[0].path, timeout_s=_BOOT_S)
    told = await channel.rest(timeout_s=_BOOT_S)
    made = await asyncio.to_thread(hooks.wnodes_template_save, vm=vm, way=way)
    channel.close()
    shape = Shape(vm.cpus, vm.memory_mib, vm.most_mib if told.get("grows") else 0)
    return Template(
        id="contract",
        folder=vm.folder,
        way=way,
        image="sha256:" + "0" * 64,
        accel=vm.accel,
        shape=shape,
        memory=made["memory"],
        disks=vm.disks,
        files=made["files"],
        mount_ports=2,
        facts=dict(channel.facts),
        identity=identity.of(told),
    )


def main(backend: str, words: list[Any]) -> int:
    """``["build", WAY, VM]`` or ``["clone", VM, TEMPLATE]``; a cloner then obeys pause, resume, fit, plug, disk."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # as a builder and a keeper are
    hooks = importlib.import_module(backend)
    verb, *rest = words
    vm = vm_from_dict(rest[verb == "build"])
    try:
        if verb == "build":
            made: Any = asyncio.run(build(hooks, rest[0], vm))
        else:
            made = hooks.wnodes_vm_clone(vm=vm, template=Template.from_dict(rest[1]))
        facts = asdict(made)
    except errors.WnodesError as error:
        facts = error.to_dict()
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        order, _, given = line.strip().partition(" ")
        if order == "plug":
            print(hooks.wnodes_vm_plug(vm=vm, nic=Nic.from_dict(json.loads(given))), flush=True)
        elif order == "disk":
            disk = Disk(**json.loads(given))
            with open(disk.path, "r+b") as file:
                print(hooks.wnodes_disk_plug(vm=vm, disk=disk, fd=file.fileno()), flush=True)
        elif order == "fit":
            print(bool(hooks.wnodes_vm_fit(vm=vm, template=Template.from_dict(rest[1]))), flush=True)
        else:
            print(hooks.wnodes_vm_pause(vm=vm, paused=order == "pause"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
