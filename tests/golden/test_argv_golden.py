"""Whole argv of clones, each from a template's that libvirt really wrote; and what is refused.

``WNODES_REGENERATE=1 pytest tests/golden`` rewrites the clones' files; the review is the diff.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wnodes_core.api import Boot, Channel, Disk, Shape, Template, Vm, errors
from wnodes_core.backends.libvirt import argv, domain, host, parts, plugin

FOLDER = Path(__file__).with_name("argv")
IMAGE, BUILT = "/images/debian12/disk.qcow2", "/var/lib/wnodes/templates/t1"
GIVEN = argv.Given(17, "/proc/self/fd/18", f"{BUILT}/kernel")
NAMES = ("org.wnodes.agent.0", "org.wnodes.mount.0", "org.wnodes.mount.1")


def template(most_mib: int = 0) -> Template:
    disks = (Disk(f"{BUILT}/overlay.qcow2", "qcow2", IMAGE, "qcow2", serial="root"),)
    return Template("t1", BUILT, "mapped", "sha256:0", "tcg", Shape(1, 512, most_mib), f"{BUILT}/memory", disks, {}, 2)


def clone(folder: str = "/var/lib/wnodes/leases/slurm-n0-12-ab12cd", most_mib: int = 0, **changes: Any) -> Vm:
    overlay = Disk(
        f"{folder}/overlay.qcow2", "qcow2", f"{BUILT}/overlay.qcow2", "qcow2", False, "root", IMAGE, "qcow2"
    )
    paths = (f"{folder}/agent.sock", f"{folder}/mount0.sock", "")
    vm = Vm(
        name="wnodes-slurm-n0-12-ab12cd", folder=folder, cpus=1, memory_mib=512, accel="tcg", disks=(overlay,),
        channels=tuple(map(Channel, NAMES, paths)), boot=Boot("/images/debian12/vmlinuz"),
        console=f"{folder}/console.log", most_mib=most_mib,
    )  # fmt: skip
    return replace(vm, **changes)


def saved(name: str = "plain") -> list[str]:
    words: list[str] = json.loads((FOLDER / f"{name}.template.json").read_text())
    return words


def adapted(words: list[str], vm: Vm | None = None) -> list[str]:
    vm = vm or clone()
    return argv.adapt(words, vm, template(vm.most_mib), GIVEN, domain.vm_uuid(vm.name))


@pytest.mark.parametrize(("name", "most_mib"), [("plain", 0), ("growing", 2048)])
def test_a_clones_argv_is_as_reviewed(name: str, most_mib: int) -> None:
    found = adapted(saved(name), clone(most_mib=most_mib))
    file = FOLDER / f"{name}.clone.json"
    if os.environ.get("WNODES_REGENERATE") == "1":
        file.write_text("[\n " + ",\n ".join(map(json.dumps, found)) + "\n]\n")
    assert found == json.loads(file.read_text())


def test_there_is_no_argv_without_a_case() -> None:
    assert {file.name.partition(".")[0] for file in FOLDER.glob("*.json")} == {"plain", "growing"}


def test_a_clone_is_found_by_its_own_name_and_a_template_by_its() -> None:
    assert plugin.name_in(tuple(adapted(saved()))) == "wnodes-slurm-n0-12-ab12cd"
    assert plugin.name_in(tuple(saved())) == "wnodes-template-t1"


def test_no_path_of_the_build_is_left_but_the_kernels() -> None:
    moved = clone()
    disk = replace(moved.disks[0], base="/elsewhere/o.qcow2", under="/elsewhere/i.qcow2")
    words = argv.adapt(saved(), replace(moved, disks=(disk,)), template(), replace(GIVEN, kernel="/k"), "u")
    assert not [word for word in words if "/proc/" in word and "self" not in word]
    assert not [word for word in words if BUILT in word or "/images" in word]


PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60).map(lambda t: f"/a/{t}")


@given(PATHS)
def test_a_path_of_any_signs_stays_one_value(folder: str) -> None:
    vm = clone(folder)
    words = adapted(saved(), vm)
    assert len(words) == len(adapted(saved()))
    channels = dict(split(value) for flag, value in zip(words, words[1:], strict=False) if flag == "-chardev")
    assert channels["charchannel0"] == {"id": "charchannel0", "path": vm.channels[0].path}
    assert channels["charchannel1"]["path"] == vm.channels[1].path
    assert channels["charserial0"]["path"] == vm.console
    nodes = [json.loads(value) for flag, value in zip(words, words[1:], strict=False) if flag == "-blockdev"]
    assert [node["filename"] for node in nodes if "filename" in node] == [
        IMAGE, f"{BUILT}/overlay.qcow2", vm.disks[0].path,
    ]  # fmt: skip


def split(value: str) -> tuple[str, dict[str, str]]:
    """As QEMU reads its own option syntax (util/qemu-option.c, get_opt_value): two commas are one sign."""
    words, word, index = [], "", 0
    while index < len(value):
        if value[index] == "," and value[index + 1 : index + 2] != ",":
            words.append(word)
            word = ""
        else:
            index += value[index] == ","
            word += value[index]
        index += 1
    pairs = dict(each.partition("=")[::2] for each in [*words, word][1:])
    return pairs["id"], pairs


def with_word(old: str, new: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        assert [word for word in words if old in word], old
        return [word.replace(old, new) for word in words]

    return change


def with_more(*more: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [*words, *more]


def without(flag: str, part: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        index = next(i for i, word in enumerate(words) if word == flag and part in words[i + 1])
        return words[:index] + words[index + 2 :]

    return change


ALTERED: dict[str, Callable[[list[str]], list[str]]] = {
    "empty": lambda words: [],
    "another program": with_word("/usr/bin/qemu-system-x86_64", "/tmp/qemu-system-x86_64"),
    "a program by its name": with_word("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64"),
    "a flag too many": with_more("-runas", "root"),
    "a flag of two dashes": with_more("--device", "{}"),
    "a monitor for others": with_more("-qmp", "unix:/tmp/x,server=on"),
    "another chardev": with_more("-chardev", "socket,id=mine,path=/tmp/x,server=on"),
    "a fourth channel": with_more("-chardev", "null,id=charchannel3"),
    "a channel of odd digits": with_word("charchannel2", "charchannel²"),
    "the monitor twice": with_more("-mon", "chardev=charmonitor,id=m2"),
    "a device too many": with_more("-device", '{"driver":"virtio-rng-pci","rng":"objrng0"}'),
    "a device of the host": with_more("-device", '{"driver":"vfio-pci","host":"01:00.0"}'),
    "a device with a file": with_word('"driver":"pvpanic"', '"driver":"pvpanic","romfile":"/etc/shadow"'),
    "a device not in JSON": with_more("-device", "pvpanic"),
    "a device in a list": with_more("-device", "[]"),
    "no memory": without("-object", "memory-backend-file"),
    "other memory": with_word("536870912", "1073741824"),
    "memory that is spoken for": with_word('"share":true', '"share":true,"hugetlb":true'),
    "no disk": without("-device", "virtio-blk-pci"),
    "no root storage": without("-blockdev", "overlay.qcow2"),
    "a disk node too many": with_more("-blockdev", '{"driver":"file","filename":"/etc/shadow","node-name":"x"}'),
    "a disk over the network": with_word('"driver":"file"', '"driver":"nbd"'),
    "a disk's data elsewhere": with_word('"driver":"qcow2"', '"driver":"qcow2","data-file":"/etc/shadow"'),
    "a disk below, inline": with_word('"backing":"libvirt-2-format"', '"backing":{"driver":"file"}'),
    "its file, inline": with_word('"file":"libvirt-1-storage"', '"file":{"driver":"file"}'),
    "two nodes of one name": with_word("libvirt-2", "libvirt-1"),
    "other ports": with_word("org.wnodes.mount.0", "org.wnodes.agent.0"),
    "no serial port": without("-device", "isa-serial"),
    "another source of chance": with_word("/dev/urandom", "/dev/zero"),
    "a strange object": with_more("-object", '{"qom-type":"filter-dump","id":"f","file":"/tmp/x"}'),
    "a machine that writes": with_word("pc-q35-7.2", "pc-q35-7.2,dumpdtb=/tmp/x"),
    "sound to a file": with_word('"driver":"none"', '"driver":"wav"'),
    "a flag without its value": with_more("-msg"),
    "no name": without("-name", "guest="),
    "a NUL": with_more("-cpu", "a\0b"),
    "numbers": lambda words: [*words, 7],  # type: ignore[list-item]
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_argv_is_refused(how: str) -> None:
    adapted(saved())
    with pytest.raises(errors.ImageError, match="t1: its QEMU's argv cannot be cloned"):
        adapted(ALTERED[how](saved()))


def test_a_template_of_another_shape_is_refused() -> None:
    for vm in (
        clone(most_mib=2048),
        clone(channels=()),
        clone(disks=()),
        clone(console=""),
        clone(channels=(*clone().channels, Channel("org.wnodes.mount.2", "/x"))),
    ):
        with pytest.raises(errors.ImageError):
            adapted(saved(), vm)


@given(st.lists(st.sampled_from(saved("growing")) | st.text(max_size=20), max_size=120))
def test_words_in_disorder_are_refused_or_harmless(words: list[str]) -> None:
    try:
        found = adapted([host.QEMUS[0], *words])
    except errors.ImageError:
        return
    assert {flag for flag, _ in parts.parse([word for word in found if word not in ("-incoming", "defer")])[1]}


@given(st.integers(0, len(saved()) - 1), st.text(max_size=30))
def test_a_word_replaced_brings_no_path_of_its_own(index: int, text: str) -> None:
    words = saved()
    words[index] = f"/{text}"
    try:
        found = adapted(words)
    except errors.ImageError:
        return
    assert f"/{text}" not in found or text == words[index][1:] == "usr/bin/qemu-system-x86_64"
