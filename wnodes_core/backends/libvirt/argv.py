"""From the argv of a template's QEMU to that of a clone: the same machine, other files.

A saved guest only loads into the very machine it was saved from, and what that machine is, libvirt has
said once, in the argv of the QEMU that was saved. A clone repeats it word for word but for names, files
and sockets. Asking libvirt again would cost a clone 0.25 s, most of it 400 questions about CPU flags.

The argv comes from a file, so it is taken for nothing but a list of parts (``parts.py``): a flag, a device
or a file that is not expected is refused, and every path in the clone's argv is the caller's own.

Pure: text in, text out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wnodes_core.api import Channel, Template, Vm, errors
from wnodes_core.backends.libvirt import parts
from wnodes_core.backends.libvirt.parts import Option

# A guest that ends in whatever way ends its QEMU: nobody listens to its events.
_ENDING = ("-action", "panic=shutdown,reboot=shutdown,shutdown=poweroff")
# Said anew at the end, or (secrets, files, events) there for libvirt only.
_OF_TEMPLATE = ("qom-type", "mem-path", "prealloc", "share", "reserve")  # its memory's; a clone's differ
_DROPPED = ("-S", "-no-shutdown", "-no-reboot", "-action", "-add-fd", "-initrd", "-append")


@dataclass(frozen=True)
class Given:
    """What a clone's QEMU is handed: its monitor's socket, the template's memory and the head of its kernel.

    ``direct_io`` says that the overlay's file system knows O_DIRECT.
    """

    monitor_fd: int
    memory: str
    kernel: str = ""
    direct_io: bool = True


def adapt(argv: Sequence[str], vm: Vm, template: Template, given: Given, uuid: str) -> list[str]:
    """The argv of the clone ``vm`` from the template's.

    Raises ImageError if the argv is not one that we know how to adapt.
    """
    try:
        program, options = parts.parse(argv)
        parts.check(options, vm, template.shape)
        writer = _Writer(vm, given, uuid, *_files(options, vm))
        words = [word for option in options for word in writer.words(option)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error)[:300]
        raise errors.ImageError(f"template {template.id}: its QEMU's argv cannot be cloned: {why}") from error
    return [program, *words, "-S", *_ENDING, "-incoming", "defer"]


def _files(options: Sequence[Option], vm: Vm) -> tuple[dict[str, str], tuple[str, str]]:
    """The path of each storage node of a clone, whatever the template's was; the root disk's two nodes."""
    drives = parts.drives(options)
    nodes = {node["node-name"]: node for flag, node in parts.objects(options) if flag == "-blockdev"}
    paths = {nodes[f"{drive}-format"]["file"]: vm.disks[index].path for index, drive in drives.items()}
    if 0 not in drives:
        return paths, ("", "")
    name = f"{drives[0]}-format"
    root = nodes[name]
    paths[root["file"]] = vm.disks[0].base
    if vm.disks[0].under:
        paths[nodes[root["backing"]]["file"]] = vm.disks[0].under
    return paths, (root["file"], name)


class _Writer:
    """Writes the options of one clone."""

    def __init__(self, vm: Vm, given: Given, uuid: str, paths: dict[str, str], root: tuple[str, str]) -> None:
        self._vm = vm
        self._given = given
        self._paths = paths
        self._root_nodes = root
        self._fixed = {"-name": f"guest={vm.name},debug-threads=on", "-uuid": uuid}

    def words(self, option: Option) -> list[str]:
        """The words in this option's place. Raises ValueError, KeyError."""
        flag, value = option
        if flag in _DROPPED:
            return []
        if flag in self._fixed:
            return [flag, self._fixed[flag]]
        if flag == "-kernel":
            # The guest has booted: its kernel only has to be there, as a ROM of the machine hangs on that.
            return [flag, self._given.kernel]
        if flag == "-chardev":
            return [flag, self._chardev(value or "")]
        write = {"-object": self._object, "-blockdev": self._blockdev, "-device": self._device}.get(flag)
        if write:
            return [word for each in write(json.loads(value or "")) for word in (flag, json.dumps(each))]
        return [flag] if value is None else [flag, value]

    def _object(self, each: dict[str, Any]) -> list[dict[str, Any]]:
        if each["qom-type"] == "secret":
            return []
        if not each["qom-type"].startswith("memory-backend-"):
            return [each]
        memory = {word: each[word] for word in each if word not in _OF_TEMPLATE} | {"share": False}
        if each["id"] in parts.MAIN_MEMORY:
            return [{"qom-type": "memory-backend-file", **memory, "mem-path": self._given.memory}]
        # What can be plugged is empty in the template. A file, since QEMU tells vhost-user back-ends of no other.
        return [{"qom-type": "memory-backend-memfd", **memory, "share": True, "reserve": False}]

    def _device(self, each: dict[str, Any]) -> list[dict[str, Any]]:
        # QEMU takes virtio-mem's features from the kind of memory behind it, which is another now.
        return [{**each, "unplugged-inaccessible": "on"} if each["driver"] == "virtio-mem-pci" else each]

    def _chardev(self, value: str) -> str:
        name = parts.chardev_id(value)
        if name == parts.MONITOR:
            return f"socket,id={name},fd={self._given.monitor_fd}"
        if name == parts.SERIAL:
            return f"file,id={name},path={_escaped(self._vm.console)},append=on"
        number = parts.channel_number(name)
        return _channel(name, self._vm.channels[number], called=number > 0)

    def _blockdev(self, each: dict[str, Any]) -> list[dict[str, Any]]:
        name = each["node-name"]
        # What all clones read is read once for all of them, through the host's page cache.
        each = {**each, "cache": {"direct": False, "no-flush": False}}
        if each["driver"] == "file":
            each = {**each, "filename": self._paths[name]}
        return self._root(each) if name in self._root_nodes else [each]

    def _root(self, each: dict[str, Any]) -> list[dict[str, Any]]:
        """The template's own root disk becomes read-only, below the clone's overlay."""
        disk = self._vm.disks[0]
        below = {**each, "read-only": True}
        above = {**each, "read-only": False, "cache": {"direct": self._given.direct_io, "no-flush": False}}
        if each["driver"] == "file":
            below.pop("auto-read-only", None)
            return [{**below, "node-name": "template-storage"}, {**above, "filename": disk.path}]
        below |= {"node-name": "template-format", "file": "template-storage"}
        return [below, {**above, "driver": disk.format, "backing": "template-format"}]


def _channel(name: str, channel: Channel, *, called: bool) -> str:
    if not channel.path:
        return f"null,id={name}"
    # The agent's port calls at the keeper that waits already: the guest never sees its port hang up.
    return f"socket,id={name},path={_escaped(channel.path)}" + (",server=on,wait=off" if called else "")


def _escaped(path: str) -> str:
    """A path within QEMU's own option syntax, where a comma ends a value."""
    return path.replace(",", ",,")
