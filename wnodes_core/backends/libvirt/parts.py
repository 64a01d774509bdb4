"""The parts of a QEMU's argv as libvirt writes it, and whether they are those of a VM of ours.

libvirt 7 to 11 agree in these words (src/qemu/qemu_command.c, qemu_alias.c). Whatever else stands in an
argv is not passed on to a clone's QEMU: it has been altered, or comes of a libvirt that nobody has tried.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from wnodes_core.api import Shape, Vm
from wnodes_core.backends.libvirt.host import QEMUS

Option = tuple[str, str | None]

MONITOR, SERIAL = "charmonitor", "charserial0"
MAIN_MEMORY = ("pc.ram", "ram-node0")  # without and with a NUMA cell
_CHANNEL = re.compile(r"charchannel([0-9]{1,2})")
_DISK = re.compile(r"virtio-disk([0-9]{1,2})")
_BARE = frozenset(("-S", "-no-user-config", "-nodefaults", "-no-shutdown", "-no-reboot", "-no-hpet", "-no-acpi"))
_VALUED = frozenset(
    ("-name", "-object", "-machine", "-accel", "-cpu", "-m", "-overcommit", "-smp", "-numa", "-uuid", "-display")
    + ("-chardev", "-mon", "-rtc", "-boot", "-kernel", "-initrd", "-append", "-device", "-blockdev", "-add-fd")
    + ("-audiodev", "-sandbox", "-msg", "-action", "-global")
)
_JSON = ("-object", "-device", "-blockdev", "-audiodev")
# Of these a clone takes neither path nor name from the template: they are written anew or left out.
_WRITTEN = ("-name", "-uuid", "-chardev", "-kernel", "-initrd", "-append", "-add-fd", "-object", "-blockdev")
_OBJECTS = ("secret", "rng-random", "memory-backend-file", "memory-backend-ram", "memory-backend-memfd")
_DRIVERS = ("file", "qcow2", "raw")
_MEMORY_WORDS = frozenset(
    ("qom-type", "id", "size", "mem-path", "share", "prealloc", "reserve", "dump", "merge", "policy", "host-nodes")
    + ("x-use-canonical-path-for-ramblock-id", "discard-data", "align")
)
_DISK_WORDS = frozenset(
    ("driver", "filename", "node-name", "cache", "auto-read-only", "discard", "detect-zeroes", "aio", "read-only")
    + ("file", "backing")
)
# How many of each a VM has; any number of bridges.
_BRIDGES = ("pcie-root-port", "pcie-pci-bridge")


def parse(argv: Sequence[str]) -> tuple[str, list[Option]]:
    """The program and its options, each a flag with its value or None.

    Raises ValueError for a program that is no QEMU of this host, and for a flag that is not known.
    """
    words = list(argv)
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ValueError("want a list of words")
    program = words.pop(0)
    if program not in QEMUS:
        raise ValueError(f"program {program!r}: want {' or '.join(QEMUS)}")
    options: list[Option] = []
    while words:
        flag = words.pop(0)
        if flag in _BARE:
            options.append((flag, None))
        elif flag in _VALUED and words:
            options.append((flag, words.pop(0)))
        else:
            raise ValueError(f"{flag!r}: no flag that a VM of ours has")
    return program, options


def objects(options: Sequence[Option]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options that libvirt writes in JSON. Raises ValueError."""
    for flag, value in options:
        if flag in _JSON:
            found = json.loads(value or "")
            if not isinstance(found, dict):
                raise ValueError(f"{flag} {value!r}: want a JSON object")
            yield flag, found


def chardev_id(value: str) -> str:
    """The id of a chardev, '' if it has none.

    >>> chardev_id("socket,id=charchannel1,fd=12,server=on,wait=off")
    'charchannel1'
    """
    return next((word[3:] for word in value.split(",") if word.startswith("id=")), "")


def channel_number(name: str) -> int:
    """The number of a channel's chardev. Raises ValueError if it is another's.

    >>> channel_number("charchannel12")
    12
    """
    found = _CHANNEL.fullmatch(name)
    if not found:
        raise ValueError(f"chardev {name!r}: no VM of ours has it")
    return int(found[1])


def drives(options: Sequence[Option]) -> dict[int, str]:
    """By the disk's number how libvirt begins the names of its nodes, as in ``libvirt-1`` (``-format``)."""
    found = {}
    for flag, each in objects(options):
        number = _DISK.fullmatch(str(each.get("id"))) if flag == "-device" else None
        if number:
            found[int(number[1])] = str(each["drive"]).removesuffix("-format")
    return found


def check(options: Sequence[Option], vm: Vm, shape: Shape) -> None:
    """That these are the parts of a machine that ``vm`` can be a clone on. Raises ValueError, KeyError."""
    _check_devices([each for flag, each in objects(options) if flag == "-device"], vm, shape)
    _check_objects([each for flag, each in objects(options) if flag == "-object"], shape)
    _check_chardevs([chardev_id(value or "") for flag, value in options if flag == "-chardev"], vm)
    _check_disks([each for flag, each in objects(options) if flag == "-blockdev"], vm, drives(options))
    _check_paths(options)
    flags = Counter(flag for flag, _ in options)
    for flag in ("-name", "-uuid", "-machine", "-m", "-mon"):
        if flags[flag] != 1:
            raise ValueError(f"{_times(flag, flags[flag])}: want one")


def _check_paths(options: Sequence[Option]) -> None:
    named = [f"{flag} {value}" for flag, value in options if flag not in _WRITTEN and "/" in (value or "")]
    if named:
        raise ValueError(f"{named[0][:200]!r} names a file: no part of ours does")
    if any(flag == "-audiodev" and each["driver"] != "none" for flag, each in objects(options)):
        raise ValueError("a sound card that is heard: want driver none")


def _times(what: str, number: int) -> str:
    """As in ``2 times -mon``."""
    return f"{number} times {what}"


def _check_devices(devices: Sequence[dict[str, Any]], vm: Vm, shape: Shape) -> None:
    wanted = Counter(
        {
            "virtio-blk-pci": len(vm.disks),
            "virtserialport": len(vm.channels),
            "virtio-serial-pci": 1,
            "virtio-rng-pci": 1,
            "pvpanic": 1,
            "isa-serial": int(bool(vm.console)),
        }
    )
    found = Counter(str(each["driver"]) for each in devices if each["driver"] not in _BRIDGES)
    # A guest without the driver has the device all the same.
    if found.pop("virtio-mem-pci", 0) not in ((1,) if shape.most_mib > shape.memory_mib else (0, 1)):
        raise ValueError(f"no memory that can be plugged: want up to {shape.most_mib} MiB")
    _compare("device", found, wanted)
    ports = [each["name"] for each in devices if each["driver"] == "virtserialport"]
    if ports != [channel.name for channel in vm.channels]:
        raise ValueError(f"ports {ports}: want {[channel.name for channel in vm.channels]}")


def _check_objects(found: Sequence[dict[str, Any]], shape: Shape) -> None:
    strange = [each["qom-type"] for each in found if each["qom-type"] not in _OBJECTS]
    if strange:
        raise ValueError(f"objects {strange}: no VM of ours has them")
    for each in found:
        if each["qom-type"].startswith("memory-backend-") and each.keys() - _MEMORY_WORDS:
            raise ValueError(f"memory {str(each)[:200]}: want libvirt's words only")
    main = [each["size"] for each in found if each["id"] in MAIN_MEMORY]
    if main != [shape.memory_mib << 20]:
        raise ValueError(f"memory of {main} bytes: want {shape.memory_mib << 20}")
    if [each["filename"] for each in found if each["qom-type"] == "rng-random"] != ["/dev/urandom"]:
        raise ValueError("random numbers from another source: want /dev/urandom")


def _check_chardevs(names: Sequence[str], vm: Vm) -> None:
    wanted = [MONITOR, *([SERIAL] if vm.console else []), *(f"charchannel{n}" for n in range(len(vm.channels)))]
    _compare("chardev", Counter(names), Counter(wanted))


def _check_disks(nodes: Sequence[dict[str, Any]], vm: Vm, found: dict[int, str]) -> None:
    if sorted(found) != list(range(len(vm.disks))):
        raise ValueError(f"disks {sorted(found)}: want {len(vm.disks)}")
    for each in nodes:
        if each["driver"] not in _DRIVERS or each.keys() - _DISK_WORDS:
            raise ValueError(f"disk node {str(each)[:200]}: want one of {', '.join(_DRIVERS)} with libvirt's words")
    # A node of its own for each file, and one for its format: of the image below the root disk too.
    wanted = 2 * (len(vm.disks) + bool(vm.disks and vm.disks[0].under))
    if len(nodes) != wanted or len({each["node-name"] for each in nodes}) != wanted:
        raise ValueError(f"{len(nodes)} disk nodes: want {wanted} of different names")


def _compare(what: str, found: Counter[str], wanted: Counter[str]) -> None:
    for name in found.keys() | wanted.keys():
        if found[name] != wanted[name]:
            raise ValueError(f"{_times(f'{what} {name!r}', found[name])}: want {wanted[name]}")
