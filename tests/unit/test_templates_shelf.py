"""The shelf of templates: what appears, what is found again, what is thrown away; and what a builder may not do."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from wnodes_core.errors import ImageError
from wnodes_core.model import Disk, Shape, Template
from wnodes_core.templates import shelf as shelf_module
from wnodes_core.templates.shelf import Shelf

ID = "0123abcd-0123456789abcdef"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.write_bytes(b"image")
    return image


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(tmp_path / "templates")
    shelf.make()
    return shelf


def leave(tmp_path: Path, base: Path, template_id: str = ID) -> tuple[dict, Path]:
    """What a builder leaves: its last word and its folder."""
    folder = tmp_path / f"built-{os.urandom(2).hex()}"
    folder.mkdir()
    for name, data in (("memory", b"\0" * 8192 + b"m" * 100), ("state", b"s"), ("argv.json", b"[]"), ("overlay.qcow2", b"o")):
        (folder / name).write_bytes(data)
    template = Template(
        id=template_id,
        folder=str(folder),
        way="mapped",
        image="sha256:" + "0" * 64,
        accel="tcg",
        shape=Shape(1, 512, 4096),
        memory=str(folder / "memory"),
        disks=(Disk(str(folder / "overlay.qcow2"), "qcow2", str(base), "raw"),),
        files={"argv": "argv.json", "state": "state"},
        mount_ports=2,
    )
    return json.loads(json.dumps(asdict(template))), folder


def test_what_was_put_is_found_with_its_files_where_they_are_now(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    made, folder = leave(tmp_path, base)
    put = shelf.put(made, folder)
    found = shelf.find(ID)
    assert found == put
    assert found is not None
    assert Path(found.memory) == shelf.root / ID / "memory"
    assert Path(found.memory).read_bytes() == (folder / "memory").read_bytes()
    assert found.disks[0].path == str(shelf.root / ID / "overlay.qcow2")
    modes = {path.stat().st_mode & 0o777 for path in (shelf.root / ID).iterdir() if path.name != "template.json"}
    assert modes == {0o444 if os.geteuid() == 0 else 0o600}
    assert [kept.template for kept in shelf.all()] == [put]


def test_pages_of_zeros_take_no_room(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    made, folder = leave(tmp_path, base)
    (folder / "memory").write_bytes(b"\0" * (64 << 20) + b"end")
    template = shelf.put(made, folder)
    found = os.stat(template.memory)
    assert (found.st_size, found.st_blocks * 512 < 1 << 20) == ((64 << 20) + 3, True)


@pytest.mark.parametrize("name", ["memory", "state", "argv.json", "overlay.qcow2"])
@pytest.mark.parametrize("harm", ["cut", "altered", "replaced", "removed"])
def test_a_template_with_a_harmed_file_is_thrown_away(shelf: Shelf, tmp_path: Path, base: Path, name: str, harm: str) -> None:
    shelf.put(*leave(tmp_path, base))
    path = shelf.root / ID / name
    if harm == "cut":
        os.truncate(path, 0)
    elif harm == "altered":
        with open(path, "r+b") as file:
            file.write(b"x")
    elif harm == "replaced":
        other = path.with_name("other")
        other.write_bytes(b"!" + path.read_bytes()[1:])
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        os.rename(other, path)
    else:
        path.unlink()
    assert shelf.find(ID) is None
    assert shelf.all() == []
    assert not (shelf.root / ID).exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"template": {}}', b"\xff" * 100])
def test_a_manifest_that_says_nothing_is_no_template(shelf: Shelf, tmp_path: Path, base: Path, text: bytes) -> None:
    shelf.put(*leave(tmp_path, base))
    (shelf.root / ID / "template.json").write_bytes(text)
    assert shelf.find(ID) is None
    assert shelf.leftovers() == []


def test_a_template_moved_to_another_name_is_not_that_one(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    shelf.put(*leave(tmp_path, base))
    other = "0123abcd-ffffffffffffffff"
    os.rename(shelf.root / ID, shelf.root / other)
    assert shelf.find(other) is None


def test_it_goes_with_its_image(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    shelf.put(*leave(tmp_path, base))
    base.unlink()
    assert shelf.find(ID) is None
    shelf.put(*leave(tmp_path, base))
    assert shelf.purge() == [ID]


def test_the_least_recently_used_goes_beyond_the_bound(tmp_path: Path, base: Path) -> None:
    shelf = Shelf(tmp_path / "templates", max_templates=2)
    shelf.make()
    ids = [f"0123abcd-{n:016x}" for n in range(4)]
    for age, each in enumerate(ids):
        shelf.put(*leave(tmp_path, base, each))
        os.utime(shelf.root / each, (time.time() - 100 + age, time.time() - 100 + age))
    assert shelf.find(ids[0])  # used now
    assert set(shelf.purge()) == {ids[1], ids[2]}
    assert {kept.template.id for kept in shelf.all()} == {ids[0], ids[3]}


def test_too_much_room_is_given_back_but_not_that_of_the_newest(tmp_path: Path, base: Path) -> None:
    shelf = Shelf(tmp_path / "templates", max_mib=0)
    shelf.make()
    made, folder = leave(tmp_path, base)
    (folder / "memory").write_bytes(os.urandom(3 << 20))
    shelf.put(made, folder)
    assert shelf.purge(keep=ID) == []
    assert shelf.purge() == [ID]


@pytest.mark.parametrize("name", ["../x", "", "0123abcd-0123456789abcde/", "0123ABCD-0123456789abcdef"])
def test_only_an_id_can_be_removed(shelf: Shelf, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ImageError, match="want an id"):
        shelf.remove(name)
    assert (tmp_path / "x").exists()


def test_a_removal_leaves_who_has_it_open_alone(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    template = shelf.put(*leave(tmp_path, base))
    with open(template.memory, "rb") as file:
        shelf.remove(ID)
        shelf.remove(ID)
        assert file.read()[-1:] == b"m"


# A builder runs a guest, and the guest may have broken out.


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../../etc"},
        {"id": "0123abcd-ffffffffffffffff/x"},
        {"files": {"argv": "../../../etc/shadow", "state": "state"}},
        {"files": {"argv": "template.json", "state": "state"}},
        {"files": {"argv": ".hidden", "state": "state"}},
        {"files": 7},
        {"disks": "x"},
        {"shape": None},
        {"memory": "/etc/shadow"},
    ],
)
def test_a_builders_lies_are_refused(shelf: Shelf, tmp_path: Path, base: Path, change: dict) -> None:
    made, folder = leave(tmp_path, base)
    with pytest.raises((ImageError, OSError)):
        shelf.put({**made, **change}, folder)
    assert shelf.all() == []
    assert shelf.leftovers() == []


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_nothing_a_builder_left_is_followed(shelf: Shelf, tmp_path: Path, base: Path, kind: str) -> None:
    made, folder = leave(tmp_path, base)
    (folder / "state").unlink()
    if kind == "link":
        (folder / "state").symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(folder / "state")
    else:
        (folder / "state").mkdir()
    with pytest.raises((ImageError, OSError)):
        shelf.put(made, folder)
    assert shelf.all() == []


def test_a_full_disk_leaves_nothing_half(
    shelf: Shelf, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = leave(tmp_path, base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf_module, "_copy_range", full)
    with pytest.raises(Exception, match="No space left"):
        shelf.put(made, folder)
    assert (shelf.all(), shelf.leftovers()) == ([], [])


def test_one_builder_at_a_time(shelf: Shelf) -> None:
    with shelf.building(ID), shelf.building(ID, wait=False) as alone:
        assert not alone
    with shelf.building(ID, wait=False) as alone:
        assert alone


def test_a_sibling_of_another_shape_is_another_template(shelf: Shelf, tmp_path: Path, base: Path) -> None:
    template = shelf.put(*leave(tmp_path, base))
    assert template.shape.fits(1, 4096) and template.shape.fits(1, 512)
    assert not template.shape.fits(2, 512) and not template.shape.fits(1, 511)
    assert not replace(template.shape, most_mib=0).fits(1, 513)


def test_what_is_made_above_it_is_as_private_as_it_is(tmp_path: Path) -> None:
    """It may be the user's state folder, which no run would take that others can look into."""
    Shelf(tmp_path / "state/deep/templates").make()
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("state", "state/deep", "state/deep/templates")}
    assert modes == {0o711 if os.geteuid() == 0 else 0o700}
