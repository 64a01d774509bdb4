"""Making room: by age, by watermark, never what is in use, and dry."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import BadRequest
from wnodes_core.images import Entry, Store, purge, use
from wnodes_core.images.layout import try_lock
from wnodes_core.plugins import Plugins
from wnodes_core.settings import PurgeSettings

DAY = 86400
MIB = 1 << 20
NEVER = PurgeSettings(max_age_days=0, high_percent=100, low_percent=100)
AGE = PurgeSettings(max_age_days=30, high_percent=100, low_percent=100)
EMPTY_DISK = lambda path: (0, 100)  # noqa: E731 - used as a value only


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
    for number, days in ((1, 100), (2, 50), (3, 10), (4, 1)):
        add(store, tmp_path, f"image{number}", days)
    return store


def add(store: Store, tmp_path: Path, name: str, days: float) -> Entry:
    (tmp_path / name).write_bytes(name.encode().ljust(512, b".") * 2 * 1024)
    entry = store.add(str(tmp_path / name), name, format="raw")
    idle(store, entry, days)
    return entry


def idle(store: Store, entry: Entry, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(store.layout.blob(entry.disk.digest), (then, then))


def gone(store: Store, settings: PurgeSettings, **more: Any) -> list[str]:
    more.setdefault("usage", EMPTY_DISK)
    found = purge.purge(store.layout, store.entries(), settings, **more)
    return [name for one in found for name in one.names or (one.reason,)]


def left(store: Store) -> list[str]:
    return [entry.name for entry in store.list() if store.image(entry)]


def test_the_old_go_and_their_names_stay(store: Store) -> None:
    found = purge.purge(store.layout, store.entries(), AGE, usage=EMPTY_DISK)
    assert [(one.names, one.reason) for one in found] == [
        (("image1:latest",), "not used for 100 days"),
        (("image2:latest",), "not used for 50 days"),
    ]
    assert all(one.size_bytes >= MIB for one in found)
    assert left(store) == ["image3", "image4"]
    assert store.ensure(store.resolve("image1"))  # from its source again


def test_a_dry_run_says_the_same_and_does_nothing(store: Store) -> None:
    assert gone(store, AGE, dry_run=True) == ["image1:latest", "image2:latest"]
    assert left(store) == ["image1", "image2", "image3", "image4"]
    assert gone(store, AGE) == ["image1:latest", "image2:latest"]


def test_age_zero_means_never(store: Store) -> None:
    assert gone(store, NEVER) == []


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        (89, []),
        (90, ["image1:latest"]),
        (91, ["image1:latest", "image2:latest"]),
        (99, ["image1:latest", "image2:latest", "image3:latest", "image4:latest"]),
    ],
)
def test_watermarks_take_the_least_recently_used_first(store: Store, used: int, expected: list[str]) -> None:
    settings = PurgeSettings(max_age_days=0, high_percent=90, low_percent=89)
    total = 100 * MIB
    assert gone(store, settings, usage=lambda path: (used * MIB, total)) == expected


def test_what_goes_by_age_counts_for_the_watermark(store: Store) -> None:
    settings = PurgeSettings(max_age_days=60, high_percent=90, low_percent=89)
    assert gone(store, settings, usage=lambda path: (90 * MIB, 100 * MIB)) == ["image1:latest"]


def test_use_changes_the_order(store: Store) -> None:
    store.ensure(store.resolve("image1"))
    idle(store, store.resolve("image3"), 20)
    settings = PurgeSettings(max_age_days=0, high_percent=90, low_percent=89)
    assert gone(store, settings, usage=lambda path: (91 * MIB, 100 * MIB)) == ["image2:latest", "image3:latest"]


def test_what_was_used_a_moment_ago_stays_even_when_full(store: Store) -> None:
    settings = PurgeSettings(max_age_days=1, high_percent=1, low_percent=1)
    store.ensure(store.resolve("image4"))
    gone(store, settings, usage=lambda path: (100 * MIB, 100 * MIB))
    assert left(store) == ["image4"]


def test_a_marked_image_stays(store: Store) -> None:
    entry = store.resolve("image1")
    store.mark_use(entry.disk.digest, "lease1", 1000)
    idle(store, entry, 100)
    assert gone(store, AGE) == ["image2:latest"]
    assert store.used_by(entry) == "lease lease1"
    store.unmark_use(entry.disk.digest, "lease1")
    assert gone(store, AGE) == ["image1:latest"]


def test_an_image_that_a_process_holds_stays(store: Store) -> None:
    entry = store.resolve("image1")
    with use.hold(store.layout.blob(entry.disk.digest)):
        assert gone(store, AGE) == ["image2:latest"]
        assert store.used_by(entry) == "a process that holds it"
    assert gone(store, AGE) == ["image1:latest"]


@pytest.fixture
def locked_like_qemu(store: Store) -> Iterator[None]:
    fd = os.open(store.layout.blob(store.resolve("image1").disk.digest), os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(use._FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0))
    yield
    os.close(fd)


def test_an_image_that_qemu_has_open_stays(store: Store, locked_like_qemu: None) -> None:
    assert gone(store, AGE) == ["image2:latest"]
    assert store.used_by(store.resolve("image1")) == "a running QEMU"


def test_a_real_qemu_is_noticed(store: Store) -> None:
    entry = store.resolve("image1")
    words = ["qemu-io", "-r", "-f", "raw", str(store.layout.blob(entry.disk.digest))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write(b"length\n")
        while b"MiB" not in qemu.stdout.readline():
            pass
        assert store.used_by(entry) == "a running QEMU"
        qemu.stdin.close()


def test_an_only_copy_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "image1").unlink()
    (tmp_path / "image2").write_bytes(b"replaced by something else")
    assert gone(store, AGE) == []


def test_a_blob_without_a_name_goes_after_an_hour(store: Store) -> None:
    entry = store.resolve("image4")
    (store.layout.catalogue / "image4.json").unlink()
    idle(store, entry, 0.03)
    assert gone(store, NEVER) == []
    idle(store, entry, 0.05)
    assert gone(store, NEVER) == ["no image names it"]


def test_forgotten_partial_files_go_but_not_a_running_fetch(store: Store) -> None:
    old, running, young = (store.layout.partial(name) for name in ("a" * 64, "b" * 64, "c" * 64))
    for path in (old, running, young):
        path.write_bytes(b"part")
        path.with_name(f"{path.name}.seen").write_text("{}")
    for path in (old, running):
        os.utime(path, (0, 0))
    fd = try_lock(store.layout.lock(running.name))
    assert gone(store, NEVER) == ["a fetch that nobody went on with"]
    assert sorted(path.name[:1] for path in running.parent.iterdir()) == ["b", "b", "c", "c"]
    assert fd is not None
    os.close(fd)


def test_an_image_being_fetched_right_now_is_not_removed(store: Store) -> None:
    fd = try_lock(store.layout.lock(store.resolve("image1").disk.digest))
    assert fd is not None
    assert gone(store, AGE) == ["image2:latest"]
    os.close(fd)


def test_removed_names_leave_files_that_are_used(store: Store) -> None:
    store.tag("image1", "other")
    assert store.remove("image1") == []
    store.mark_use(store.resolve("other").disk.digest, "lease1")
    assert store.remove("other") == []
    assert len(list(store.layout.blobs.iterdir())) == 4


def test_a_store_that_does_not_exist_needs_no_room(tmp_path: Path) -> None:
    assert purge.purge(Store(tmp_path / "none").layout, [], AGE) == []
    assert not (tmp_path / "none").exists()


def test_real_watermarks_on_a_small_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=True)
    try:
        store = Store(small, Plugins(builtins=("wnodes_core.images.sources",), scan=False).hook)
        for number, days in ((1, 3), (2, 2), (3, 1)):
            add(store, tmp_path, f"image{number}", days)
        settings = PurgeSettings(max_age_days=0, high_percent=70, low_percent=60)
        assert [one.names for one in store.purge(settings)] == [("image1:latest",)]
        assert store.purge(settings) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("lease", ["../../etc", "a/b", "", ".x", "a\n"])
def test_a_lease_is_a_plain_name(store: Store, lease: str) -> None:
    with pytest.raises(BadRequest):
        store.mark_use("sha256:" + "a" * 64, lease)
