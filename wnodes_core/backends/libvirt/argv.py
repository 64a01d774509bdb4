"""From the argv of a template's QEMU to that of a clone: the same machine, other files.

A saved guest only loads into the very machine it was saved from, and what that machine is, libvirt has
said once, in the argv of the QEMU that was saved. A clone repeats it word for word but for names, files
and sockets. Asking libvirt again would cost a clone 0.25 s, most of it 400 questions about CPU flags.

Pure: text in, text out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wnodes_core.api import Channel, Template, Vm, errors

# In which QEMU's own words name things; libvirt 7 to 11 agree (src/qemu/qemu_command.c, qemu_alias.c).
_MONITOR, _SERIAL, _CHANNEL = "charmonitor", "charserial0", "charchannel"
_MAIN_MEMORY = ("pc.ram", "ram-node0")
_ROOT_DISK = "virtio-disk0"


@dataclass(frozen=True)
class Parts:
    """What a clone's QEMU inherits: its monitor's socket, and the path of the template's memory."""

    monitor_fd: int
    memory: str


def adapt(argv: Sequence[str], vm: Vm, template: Template, parts: Parts, uuid: str) -> list[str]:
    """The argv of the clone ``vm`` from the template's.

    Raises ImageError if the argv is not one that we know how to adapt.
    """
    program, *rest = argv
    rules = _rules(vm, _root_drive(rest), parts, uuid)
    clone = [program]
    for flag, value in _options(rest):
        for word in rules.get(flag, _same)(flag, value):
            clone.append(word)
    missing = {_MONITOR, f"{_CHANNEL}0", "-incoming"} - _names(clone)
    if missing or not _has_memory(clone, parts.memory):
        raise errors.ImageError(f"template {template.id}: its QEMU's argv is none that can be cloned")
    return clone


_Rule = Callable[[str, str], list[str]]


def _rules(vm: Vm, root: str, parts: Parts, uuid: str) -> dict[str, _Rule]:
    def drop(flag: str, value: str) -> list[str]:
        return []

    def say(*words: str) -> _Rule:
        return lambda flag, value: [flag, *words]

    return {
        "-name": say(f"guest={vm.name},debug-threads=on"),
        "-uuid": say(uuid),
        # libvirt would hear of a guest's end and act; without it QEMU itself has to end.
        "-no-shutdown": lambda flag, value: ["-action", "panic=shutdown,reboot=shutdown,shutdown=poweroff"],
        "-add-fd": drop,  # the serial port's file, which is another now
        "-object": lambda flag, value: _object(value, parts.memory),
        "-chardev": lambda flag, value: _chardev(value, vm, parts.monitor_fd),
        "-blockdev": lambda flag, value: _blockdev(value, vm, root),
        "-device": lambda flag, value: [flag, _device(value)],
        "-msg": lambda flag, value: [flag, value, "-incoming", "defer"],
    }


def _same(flag: str, value: str) -> list[str]:
    return [flag, value] if value else [flag]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags with their values; '' where there is none (no value of QEMU's begins with a dash)."""
    index = 0
    while index < len(words):
        following = words[index + 1] if index + 1 < len(words) else "-"
        bare = following.startswith("-")
        yield words[index], "" if bare else following
        index += 1 if bare else 2


def _json(value: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _object(value: str, memory: str) -> list[str]:
    given = _json(value)
    if given.get("qom-type") == "secret":
        return []
    if not str(given.get("qom-type", "")).startswith("memory-backend-"):
        return ["-object", value]
    given.pop("mem-path", None)
    given.pop("prealloc", None)
    if given.get("id") in _MAIN_MEMORY:
        given |= {"qom-type": "memory-backend-file", "mem-path": memory, "share": False}
    else:  # what can be plugged is empty in the template
        given |= {"qom-type": "memory-backend-ram", "share": False, "reserve": False}
    return ["-object", json.dumps(given)]


def _device(value: str) -> str:
    """A device as it is; virtio-mem's features are stated, because QEMU takes them from the kind of memory behind it."""
    given = _json(value)
    if not str(given.get("driver", "")).startswith("virtio-mem-"):
        return value
    return json.dumps({**given, "unplugged-inaccessible": "on"})


def _chardev(value: str, vm: Vm, monitor_fd: int) -> list[str]:
    name = _id(value)
    if name == _MONITOR:
        return ["-chardev", f"socket,id={name},fd={monitor_fd}"]
    if name == _SERIAL:
        return ["-chardev", f"file,id={name},path={_escaped(vm.console)},append=on"]
    number = name.removeprefix(_CHANNEL)
    if number.isdigit() and int(number) < len(vm.channels):
        return ["-chardev", _channel(name, vm.channels[int(number)], called=int(number) > 0)]
    return ["-chardev", value]


def _channel(name: str, channel: Channel, *, called: bool) -> str:
    if not channel.path:
        return f"null,id={name}"
    # The agent's port calls at the keeper that waits already: the guest never sees its port hang up.
    return f"socket,id={name},path={_escaped(channel.path)}" + (",server=on,wait=off" if called else "")


def _blockdev(value: str, vm: Vm, root: str) -> list[str]:
    """The template's own root disk becomes read-only, below the clone's overlay; all others are as they were."""
    given = _json(value)
    kind = str(given.get("node-name", "")).removeprefix(f"{root}-")
    if kind not in ("storage", "format"):
        return ["-blockdev", value]
    below = {**given, "node-name": f"template-{kind}", "read-only": True}
    above = {**given, "read-only": False}
    if kind == "storage":
        below.pop("auto-read-only", None)
        below["filename"], above["filename"] = vm.disks[0].base, vm.disks[0].path
    else:
        below["file"] = "template-storage"
        above |= {"driver": vm.disks[0].format, "backing": "template-format"}
    return ["-blockdev", json.dumps(below), "-blockdev", json.dumps(above)]


def _root_drive(argv: Sequence[str]) -> str:
    """The number that libvirt gave the root disk's nodes, as in ``libvirt-1-format``."""
    devices = (_json(value) for flag, value in _options(argv) if flag == "-device")
    drive = next((str(each.get("drive")) for each in devices if each.get("id") == _ROOT_DISK), "")
    return drive.removesuffix("-format")


def _escaped(path: str) -> str:
    """A path within QEMU's own option syntax, where a comma ends a value."""
    return path.replace(",", ",,")


def _id(value: str) -> str:
    return next((word[3:] for word in value.split(",") if word.startswith("id=")), "")


def _names(argv: Sequence[str]) -> set[str]:
    return {_id(value) for flag, value in _options(argv[1:]) if flag == "-chardev"} | {
        flag for flag, _ in _options(argv[1:])
    }


def _has_memory(argv: Sequence[str], memory: str) -> bool:
    objects = (_json(value) for flag, value in _options(argv[1:]) if flag == "-object")
    return any(given.get("mem-path") == memory for given in objects)
