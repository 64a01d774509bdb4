"""The store: adding, fetching once for all, surviving kills and full disks, verifying, access."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import (
    BadFormat,
    DigestMismatch,
    FetchError,
    ImageError,
    SettingsError,
    StateDirFull,
    UnknownImage,
    Verdict,
)
from wnodes_core.images import Entry, Part, Store, Stores, User, settle
from wnodes_core.images.layout import boot_id
from wnodes_core.markers import hookimpl
from wnodes_core.plugins import Plugins

BODY = hashlib.shake_256(b"disk").digest(1 << 20)
NOBODY = User(65534, "nobody", ("nogroup",))


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Scripted:
    """A source plug-in for ``test:`` URLs; each does what its function says."""

    wnodes_api = 1

    def __init__(self, **sources: Callable[..., None]) -> None:
        self.sources = sources
        self.calls: list[str] = []

    @hookimpl
    def wnodes_image_fetch(self, source: str, into: Path, deadline: float, progress: Any) -> bool | None:
        if not source.startswith("test://"):
            return None
        self.calls.append(source)
        self.sources[source.removeprefix("test://")](into, progress)
        return True


def gives(data: bytes) -> Callable[..., None]:
    def fetch(into: Path, progress: Any) -> None:
        progress(0, len(data))
        into.write_bytes(data)
        progress(len(data), len(data))

    return fetch


def refuses(into: Path, progress: Any) -> None:
    raise FetchError("no such thing")


def hook_with(*plugins: object) -> Any:
    found = Plugins(builtins=("wnodes_core.images.sources",), scan=False)
    for number, plugin in enumerate(plugins):
        found.register(plugin, f"test{number}")
    assert not [one for one in found.found if one.problem]
    return found.hook


def make(tmp_path: Path, *plugins: object) -> Store:
    return Store(tmp_path / "store", hook_with(*plugins))


def entry(*sources: str, data: bytes = BODY, **more: Any) -> Entry:
    return Entry("disk", "latest", Part(digest(data), sources), "raw", **more)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(BODY)
    return tmp_path / "disk.raw"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_image_is_added_found_and_removed(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    added = store.add(str(raw), "debian12:12.5", format="raw", aliases=["deb"], facts={"os": "debian12"})
    assert added.disk == Part(digest(BODY), (str(raw),))
    found = store.resolve("deb")
    image = store.image(found)
    assert image is not None
    assert (image.name, image.tag, image.digest, image.format, image.boot) == (
        "debian12",
        "12.5",
        digest(BODY),
        "raw",
        None,
    )
    assert Path(image.path).read_bytes() == BODY and image.facts == {"os": "debian12"}
    assert stat.S_IMODE(os.stat(image.path).st_mode) == 0o444
    assert names(tmp_path / "store" / "partial") == []
    (gone,) = store.remove("debian12")
    assert gone.digest == digest(BODY)
    assert store.entries() == [] and not Path(image.path).exists()


def test_kernel_and_initrd_are_blobs_too(tmp_path: Path, raw: Path) -> None:
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    store = make(tmp_path)
    store.add(
        str(raw),
        "tiny",
        format="raw",
        kernel=str(tmp_path / "vmlinuz"),
        initrd=str(tmp_path / "initrd"),
        cmdline="console=ttyS0",
    )
    found = store.resolve("tiny")
    image = store.image(found)
    assert image is not None and image.boot is not None
    assert Path(image.boot.kernel).read_bytes() == b"vmlinuz" and Path(image.boot.initrd).read_bytes() == b"initrd"
    assert image.boot.cmdline == "console=ttyS0"
    Path(image.boot.initrd).unlink()
    assert store.image(found) is None
    assert store.ensure(found) == image
    assert len(store.remove("tiny")) == 3


def test_the_format_is_found_out_or_must_be_said(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(BadFormat, match="image 'x:latest': no known format: want qcow2"):
        store.add(str(raw), "x")
    assert names(tmp_path / "store" / "blobs" / "sha256") == names(tmp_path / "store" / "partial") == []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "q", "8M"], check=True)
    assert store.add(str(tmp_path / "q"), "x").format == "qcow2"
    with pytest.raises(BadFormat, match="the catalogue says raw"):
        store.add(str(tmp_path / "q"), "y", format="raw")


def test_a_disk_that_names_host_files_never_appears(tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", evil, "1M"], check=True
    )
    store = make(tmp_path)
    pinned = Entry("evil", "latest", Part(digest(evil.read_bytes()), (str(evil),)), "qcow2")
    with pytest.raises(BadFormat, match="backing file"):
        store.ensure(pinned)
    with pytest.raises(BadFormat, match="backing file"):
        store.add(str(evil), "evil")
    assert store.image(pinned) is None and names(tmp_path / "store" / "partial") == []


@pytest.mark.parametrize("name", ["../x", "a b", "a/b", "x\n", "", "-rf", "é"])
def test_odd_names_never_become_paths(tmp_path: Path, raw: Path, name: str) -> None:
    from wnodes_core.errors import BadRequest

    with pytest.raises(BadRequest):
        make(tmp_path).add(str(raw), name, format="raw")


def test_odd_paths_are_just_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a 'b\" $(c); é,d=e"
    odd.write_bytes(BODY)
    store = make(tmp_path)
    store.add(str(odd), "odd", format="raw")
    assert store.resolve("odd").disk.sources == (str(odd),)


def test_a_site_file_goes_first_and_is_never_written(tmp_path: Path, raw: Path) -> None:
    site = tmp_path / "images.d"
    site.mkdir()
    data = {"name": "el9", "sha256": digest(BODY)[7:], "format": "raw", "sources": [str(raw)]}
    (site / "el9.yaml").write_text(json.dumps({"images": [data]}))
    store = Store(tmp_path / "store", hook_with(), extra=(site,))
    assert store.ensure(store.resolve("el9")).digest == digest(BODY)
    for act in (lambda: store.add(str(raw), "el9", format="raw"), lambda: store.remove("el9")):
        with pytest.raises(SettingsError, match="defined in .*el9.yaml"):
            act()
    store.tag("el9", "el9:tested")
    assert store.resolve("el9:tested").disk == store.resolve("el9").disk
    assert store.remove("el9:tested") == []  # the site's entry still names the file
    assert store.image(store.resolve("el9"))


def test_a_broken_catalogue_file_is_named_when_its_image_is_missed(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    store.add(str(raw), "good", format="raw")
    (store.layout.catalogue / "bad.json").write_text("{")
    assert store.resolve("good")
    with pytest.raises(UnknownImage) as caught:
        store.resolve("bad")
    assert "bad.json" in caught.value.hint
    with pytest.raises(SettingsError, match="bad.json"):
        store.add(str(raw), "bad", format="raw")


def test_mirrors_are_tried_in_order(tmp_path: Path) -> None:
    source = Scripted(a=refuses, b=gives(BODY[:-512]), c=gives(BODY), d=gives(BODY))
    image = make(tmp_path, source).ensure(entry("test://a", "test://b", "test://c", "test://d"))
    assert source.calls == ["test://a", "test://b", "test://c"]
    assert Path(image.path).read_bytes() == BODY


def test_no_source_delivers(tmp_path: Path) -> None:
    store = make(tmp_path, Scripted(a=refuses))
    with pytest.raises(FetchError) as caught:
        store.ensure(entry("test://a", "ftp://b", str(tmp_path / "gone")))
    for said in ("image 'disk:latest'", "no such thing", "ftp://b: no plug-in", "gone: No such file"):
        assert said in caught.value.message
    assert caught.value.verdict is Verdict.REQUEUE
    with pytest.raises(FetchError, match="no source"):
        store.ensure(entry())


def test_wrong_bytes_are_a_digest_mismatch_and_leave_nothing(tmp_path: Path) -> None:
    store = make(tmp_path, Scripted(a=gives(b"evil" * 128), b=refuses))
    with pytest.raises(DigestMismatch) as caught:
        store.ensure(entry("test://a", "test://b"))
    assert digest(BODY) in caught.value.message and caught.value.verdict is Verdict.HOLD
    assert names(tmp_path / "store" / "partial") == names(tmp_path / "store" / "blobs" / "sha256") == []


def test_kept_bytes_that_prove_wrong_are_fetched_anew(tmp_path: Path) -> None:
    def appends(into: Path, progress: Any) -> None:
        have = into.stat().st_size if into.exists() else 0
        progress(have, len(BODY))
        with open(into, "ab") as file:
            file.write(BODY[have:])

    store = make(tmp_path, Scripted(a=appends))
    store.layout.make()
    store.layout.partial(digest(BODY)).write_bytes(b"rotten")
    assert Path(store.ensure(entry("test://a")).path).read_bytes() == BODY


def test_a_verifying_plugin_can_refuse(tmp_path: Path, raw: Path) -> None:
    class Picky:
        wnodes_api = 1

        @hookimpl
        def wnodes_image_verify(self, image: Any) -> None:
            raise ImageError(f"unsigned {image.digest[:10]}")

    store = make(tmp_path, Picky())
    with pytest.raises(ImageError, match="unsigned sha256"):
        store.ensure(entry(str(raw)))
    assert store.image(entry(str(raw))) is None


def test_threads_share_one_fetch(tmp_path: Path) -> None:
    gate = threading.Event()

    def slow(into: Path, progress: Any) -> None:
        progress(0, len(BODY))
        into.write_bytes(BODY[:1000])
        assert gate.wait(10)
        into.write_bytes(BODY)

    source = Scripted(a=slow)
    store = make(tmp_path, source)
    told: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> None:
        told.append((done, total))
        if told.count((1000, len(BODY))) == 5:
            gate.set()

    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(lambda _: store.ensure(entry("test://a"), watch), range(6)))
    assert len(source.calls) == 1
    assert len({image.path for image in images}) == 1


def test_waiters_fail_with_the_one_who_fetched(tmp_path: Path) -> None:
    waiting: set[int] = set()  # threads: who comes only after the failure is no waiter, and tries again

    def fails(into: Path, progress: Any) -> None:
        into.write_bytes(b"x")
        deadline = time.monotonic() + 30
        while len(waiting) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise FetchError("it broke")

    source = Scripted(a=fails)
    store = make(tmp_path, source)

    def attempt(first: bool) -> str:
        with pytest.raises(FetchError) as caught:
            store.ensure(entry("test://a"), lambda done, total: waiting.add(threading.get_ident()))
        return caught.value.message

    with ThreadPoolExecutor(4) as pool:
        messages = set(pool.map(attempt, range(4)))
    assert messages == {"image 'disk:latest': it broke"}
    assert len(source.calls) == 1
    with pytest.raises(FetchError):  # but who comes later tries again
        store.ensure(entry("test://a"))
    assert len(source.calls) == 2


def test_a_waiter_does_not_wait_beyond_its_deadline(tmp_path: Path, raw: Path) -> None:
    from wnodes_core.images.layout import try_lock

    store = make(tmp_path)
    store.layout.make()
    fd = try_lock(store.layout.lock(digest(BODY)))
    assert fd is not None
    with pytest.raises(FetchError, match="did not finish in time"):
        store.ensure(entry(str(raw)), deadline=time.monotonic() + 0.1)
    os.close(fd)
    assert store.ensure(entry(str(raw)))


CHILD = """
import sys, time
from pathlib import Path
from wnodes_core.images import Store, Entry, Part
from wnodes_core.markers import hookimpl
from wnodes_core.plugins import Plugins

class Slow:
    wnodes_api = 1
    @hookimpl
    def wnodes_image_fetch(self, source, into, deadline, progress):
        have = into.stat().st_size if into.exists() else 0
        with open(sys.argv[4], "a") as log:
            log.write(f"{have}\\n")
        data = Path(source).read_bytes()
        progress(have, len(data))
        with open(into, "ab", buffering=0) as file:
            for at in range(have, len(data), 65536):
                file.write(data[at:at + 65536])
                progress(min(len(data), at + 65536), len(data))
                if sys.argv[5] == "hang" and at >= 300000:
                    print("half", flush=True)
                    time.sleep(60)
        time.sleep(0.3)
        return True

plugins = Plugins(builtins=(), scan=False)
plugins.register(Slow(), "slow")
entry = Entry("disk", "latest", Part(sys.argv[2], (sys.argv[3],)), "raw")
print(Store(sys.argv[1], plugins.hook).ensure(entry).path, flush=True)
"""


def child(tmp_path: Path, raw: Path, how: str) -> subprocess.Popen[str]:
    words = [str(tmp_path / "store"), digest(BODY), str(raw), str(tmp_path / "log"), how]
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True)


def test_eight_processes_share_one_fetch(tmp_path: Path, raw: Path) -> None:
    children = [child(tmp_path, raw, "") for _ in range(8)]
    told = {one.communicate(timeout=60)[0].strip() for one in children}
    assert [one.returncode for one in children] == [0] * 8
    (path,) = told
    assert Path(path).read_bytes() == BODY
    assert (tmp_path / "log").read_text() == "0\n"


def test_a_fetch_killed_half_way_is_gone_on_with(tmp_path: Path, raw: Path) -> None:
    killed = child(tmp_path, raw, "hang")
    assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    killed.kill()
    killed.communicate()
    store = make(tmp_path)
    assert store.image(entry()) is None
    kept = store.layout.partial(digest(BODY)).stat().st_size
    assert 300_000 <= kept < len(BODY)
    assert child(tmp_path, raw, "").communicate(timeout=60)[0].strip() == str(store.layout.blob(digest(BODY)))
    assert (tmp_path / "log").read_text() == f"0\n{kept}\n"
    assert Path(store.layout.blob(digest(BODY))).read_bytes() == BODY


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_host_error_and_keeps_no_part(small: Path) -> None:
    def grows(into: Path, progress: Any) -> None:
        progress(0, 0)
        into.write_bytes(BODY)

    store = Store(small / "store", hook_with(Scripted(a=grows)))
    with pytest.raises(StateDirFull, match="No space left") as caught:
        store.ensure(entry("test://a"))
    assert caught.value.verdict is Verdict.DRAIN
    assert names(store.layout.root / "partial") == []
    assert store.image(entry()) is None
    little = BODY[:4096]
    store = Store(small / "store", hook_with(Scripted(a=gives(little))))
    assert store.ensure(entry("test://a", data=little))


def test_verify_finds_a_flipped_bit_and_the_next_use_mends_it(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    store.add(str(raw), "disk", format="raw")
    found = store.resolve("disk")
    store.verify(found)
    path = Path(store.ensure(found).path)
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(b"\xff\xff")
    store.mark_use(found.disk.digest, "lease1")
    with pytest.raises(DigestMismatch) as caught:
        store.verify(found)
    assert "in use by lease lease1" in caught.value.hint and path.exists()
    store.release("lease1")
    with pytest.raises(DigestMismatch):
        store.verify(found)
    assert not path.exists()
    assert Path(store.ensure(found).path).read_bytes() == BODY
    store.verify(found)


def test_a_blob_that_lost_a_power_cut_is_fetched_anew(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    found = entry(str(raw))
    path = Path(store.ensure(found).path)
    mark = store.layout.fresh(found.disk.digest)
    assert mark.read_text() == boot_id()
    mark.write_text("another boot")
    os.chmod(path, 0o644)
    path.write_bytes(b"")  # what a file system may leave of a file that was never synced
    assert store.image(found) is None
    assert Path(store.ensure(found).path).read_bytes() == BODY


def test_a_blob_that_survived_a_reboot_is_settled(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    found = entry(str(raw))
    store.ensure(found)
    mark = store.layout.fresh(found.disk.digest)
    assert settle.sound(store.layout, found.disk.digest) and mark.exists()
    mark.write_text("another boot")
    assert settle.sound(store.layout, found.disk.digest) and not mark.exists()


def acl(path: str) -> str:
    return subprocess.run(["getfacl", "-pcn", path], check=True, capture_output=True, text=True).stdout


def readable(path: str, uid: int) -> bool:
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "head", "-c1", path]
    return subprocess.run(words, capture_output=True).returncode == 0


def test_a_restricted_image_is_readable_only_by_a_leases_user(tmp_path: Path, raw: Path) -> None:
    # pytest's own folders are private, and the store's must be reachable for the users of this test
    for folder in (tmp_path, *tmp_path.parents):
        if not os.stat(folder).st_mode & 0o001:
            os.chmod(folder, 0o755)
    store = make(tmp_path)
    store.add(str(raw), "secret", format="raw", users=["nobody"])
    found = store.resolve("secret", NOBODY)
    path = store.ensure(found).path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o440 and not readable(path, 65534)
    store.take(found, "lease1", 65534)
    store.take(found, "lease1", 65534)
    store.take(found, "lease2", 65534)
    assert readable(path, 65534) and not readable(path, 65533)
    store.release("lease1")
    assert readable(path, 65534)  # the other lease of the same user still needs it
    store.release("lease2")
    store.release("lease2")
    assert not readable(path, 65534) and "user:65534" not in acl(path)
    store.take(found, "lease3", 65534)
    assert store.release_dead({"lease4"}) == ["lease3"]
    assert not readable(path, 65534)


def test_a_public_name_makes_a_file_public_and_back(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    store.add(str(raw), "secret", format="raw", groups=["cms"])
    secret = store.resolve("secret")
    path = Path(store.ensure(secret).path)
    store.add(str(raw), "open", format="raw")
    store.ensure(store.resolve("open"))
    assert path.stat().st_mode & 0o777 == 0o444
    store.remove("open")
    store.ensure(secret)
    assert path.stat().st_mode & 0o777 == 0o440


def test_taking_what_was_purged_meanwhile(tmp_path: Path, raw: Path) -> None:
    store = make(tmp_path)
    store.layout.make()
    with pytest.raises(FetchError, match="not in the store any more"):
        store.take(entry(str(raw)), "lease1", 0)
    assert names(tmp_path / "store" / "use") == []


def test_own_store_before_the_nodes(tmp_path: Path, raw: Path) -> None:
    node, own = make(tmp_path / "node"), make(tmp_path / "own")
    both = Stores(own, node)
    node.add(str(raw), "shared", format="raw")
    node.add(str(raw), "el9", format="raw")
    (tmp_path / "mine").write_bytes(BODY[:4096])
    own.add(str(tmp_path / "mine"), "el9", format="raw")
    assert [str(e) for e in both.list()] == ["el9:latest", "shared:latest"]
    assert both.ensure(both.resolve("el9")).digest == digest(BODY[:4096])
    shared = both.ensure(both.resolve("shared"))
    assert shared.path.startswith(str(tmp_path / "node"))  # not fetched twice
    node.layout.blob(shared.digest).unlink()
    assert both.ensure(both.resolve("shared")).path.startswith(str(tmp_path / "own"))
    with pytest.raises(UnknownImage, match="did you mean shared"):
        both.resolve("shaerd")


def test_a_copy_keeps_holes_and_notices_odd_sources(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(BODY)
    store = make(tmp_path)
    store.add(str(sparse), "sparse", format="raw")
    blob = store.layout.blob(store.resolve("sparse").disk.digest)
    assert blob.stat().st_size == 64 << 20 and blob.stat().st_blocks * 512 < 4 << 20
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", ".", "absent"):
        with pytest.raises(FetchError):
            store.add(str(tmp_path / name), "odd", format="raw")


def test_the_store_is_private_for_users_and_open_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "node").layout.make()
    assert (tmp_path / "node" / "store").stat().st_mode & 0o777 == 0o755
    with contextlib.suppress(PermissionError):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    make(tmp_path / "own").layout.make()
    assert (tmp_path / "own" / "store").stat().st_mode & 0o777 == 0o700
