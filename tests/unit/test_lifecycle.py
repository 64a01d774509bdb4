"""A lease's way up and down, with the fake backend and the real agent: order, failures, undo."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core import processes
from wnodes_core.api import hookimpl
from wnodes_core.backends import fake
from wnodes_core.errors import BootTimeout, ChannelLost, GuestPanic, HostError, NoProvider, TransientError, WnodesError
from wnodes_core.files import remove_tree
from wnodes_core.journal import Journal, Resource
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.model import Mount, Trace
from wnodes_core.plugins import Plugins
from wnodes_core.threads import to_its_end
from wnodes_core.undoing import undo_one

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import FAKE, Stand  # noqa: E402


@pytest.fixture
def stand() -> Iterator[Stand]:
    """A stand in a short private folder: names of sockets have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="wnl-"))
    stand = Stand(folder)
    yield stand
    left = stand.left()
    fake.wnodes_vm_stop(vm=stand.plan.vm(()))
    remove_tree(folder)
    assert not left, "\n".join(left)


def test_the_order_of_the_journal_is_disk_vm_mounts_and_back(stand: Stand) -> None:
    stand.mount(count=2)
    assert stand.go() == []
    up = ["disk", "vm", "attachment", "attachment"]
    assert stand.lines() == [f"{op} {kind}" for kind in up for op in ("making", "made")] + [
        f"gone {kind}" for kind in reversed(up)
    ]
    assert [step.name for step in stand.trace.steps] == ["overlay", "define", "boot", "agent", "mount", "teardown"]
    assert stand.said == ["booting deb (1 cpus, 128 MiB, tcg)"]


def test_the_guest_has_user_groups_and_ports(stand: Stand) -> None:
    stand.mount(count=2, notice="mind the gap")
    seen: list[str] = []

    async def use(lifecycle: Lifecycle, running: Running) -> None:
        assert running.process.pid == lifecycle.watch.process.pid  # type: ignore[union-attr]
        assert (await running.channel.run(["echo", "hi"])).stdout == b"hi\n"
        seen.append((stand.folder / "guest/etc/group").read_text())
        seen.extend(path.read_text() for path in sorted(stand.folder.glob("*.gateway")))

    stand.go(use)
    assert "staff:x:50:ann" in seen[0]
    assert seen[1:] == ["org.wnodes.mount.0", "org.wnodes.mount.1"]
    assert "mind the gap" in stand.said


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("never-boots", BootTimeout, "did not answer within 0.5 s; its console ended with\n  console: fake guest"),
        ("panics", GuestPanic, "the VM ended while it started; its console ended with\n  console: Kernel panic"),
        ("dies", TransientError, "the fake QEMU ended as it started"),
        ("cut-channel", ChannelLost, "guest channel"),
    ],
)
def test_a_failing_guest_is_the_right_verdict_and_leaves_nothing(
    stand: Stand, fault: str, error: type[WnodesError], words: str
) -> None:
    stand.fault(fault, boot_timeout_s=0.5 if fault == "never-boots" else 20)

    async def use(lifecycle: Lifecycle, running: Running) -> None:
        # Enough talk to reach the point where the channel is cut.
        await running.channel.run(["head", "-c", "200000", "/dev/zero"])

    with pytest.raises(error, match=words.replace("(", r"\(")) as caught:
        stand.go(use)
    assert type(caught.value) is error
    assert stand.errors == []


def test_without_a_provider_for_the_disk_no_vm_is_started(stand: Stand) -> None:
    stand.plugins = Plugins(builtins=(FAKE,), scan=False)
    with pytest.raises(NoProvider, match="no plug-in makes a qcow2 disk on '/base'"):
        stand.go()
    assert stand.lines() == ["making disk", "gone disk"]


def test_without_a_provider_for_a_mount_the_mount_is_named(stand: Stand) -> None:
    stand.plan = replace(stand.plan, mounts=(Mount("/data", "/mnt/data", True),))
    with pytest.raises(NoProvider, match="mount /data:/mnt/data:ro: nothing can serve it to this guest: sshfs: there is no such provider"):
        stand.go()
    assert stand.lines()[-3:] == ["gone attachment", "gone vm", "gone disk"]


class Choosy:
    """Providers that answer as told, and who was asked."""

    wnodes_api = 1

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []

    @hookimpl
    def wnodes_mount_attach(self, provider: str) -> dict[str, Any] | None:
        self.asked.append(provider)
        answer = self.answers.get(provider)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @hookimpl
    def wnodes_mount_detach(self, attachment: dict[str, Any]) -> bool:
        return True


def test_the_sites_order_decides_who_serves_a_mount(stand: Stand) -> None:
    served = {"provider": "c", "guest": [], "notice": "by c"}
    choosy = Choosy(a=NoProvider("not in this guest"), b=HostError("no program"), c=served, d=served)
    stand.plugins.register(choosy, "choosy")
    stand.plan = replace(stand.plan, mounts=(Mount("/data", "/mnt/data"),), storage=("a", "b", "c", "d"))
    stand.go()
    assert choosy.asked == ["a", "b", "c"]
    assert "by c" in stand.said


@pytest.mark.parametrize(
    ("order", "kind", "text"),
    [
        (("a", "b", "x"), HostError, "^no program$"),
        (("a", "x"), NoProvider, "a: not in this guest; x: there is no such provider"),
    ],
)
def test_where_no_provider_serves_a_sick_host_is_told_before_a_poor_guest(
    stand: Stand, order: tuple[str, ...], kind: type[Exception], text: str
) -> None:
    stand.plugins.register(Choosy(a=NoProvider("not in this guest"), b=HostError("no program")), "choosy")
    stand.plan = replace(stand.plan, mounts=(Mount("/data", "/mnt/data"),), storage=order)
    with pytest.raises(kind, match=text):
        stand.go()


MEETS = """
touch "$0.$1"
n=0; until [ -e "$0.$2" ]; do n=$((n+1)); [ $n -lt 250 ] || { echo "$2 did not come" >&2; exit 1; }; sleep 0.02; done
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the fake guest's root, which is nobody, may write to."""
    with tempfile.TemporaryDirectory(prefix="wnl-open-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_mounts_go_at_the_same_time_but_those_below_another(stand: Stand, open_folder: Path) -> None:
    """a and c wait for each other's command, and a's inner one needs what a's has left."""
    mark = str(open_folder / "mark")
    commands = {
        "/mnt/a": ["sh", "-c", MEETS, mark, "a", "c"],
        "/mnt/c": ["sh", "-c", MEETS, mark, "c", "a"],
        "/mnt/a/b": ["sh", "-c", 'test -e "$0.a" || { echo too early >&2; exit 1; }', mark],
    }

    class Meeting(Choosy):
        @hookimpl
        def wnodes_mount_attach(self, mount: Mount) -> dict[str, Any]:
            return {"provider": "x", "guest": [{"argv": commands[mount.target]}], "notice": ""}

    stand.plugins.register(Meeting(), "meeting")
    stand.plan = replace(stand.plan, mounts=tuple(Mount("/data", target) for target in sorted(commands)))
    assert stand.go() == []


def test_a_mount_that_fails_in_the_guest_says_what_the_guest_said(stand: Stand) -> None:
    stand.mount("sh", "-c", "echo no such device >&2; exit 3")
    with pytest.raises(TransientError, match="mount /data:/mnt/0: no such device"):
        stand.go()


@pytest.mark.parametrize("step", ["wnodes_disk_create", "wnodes_vm_start", "wnodes_mount_attach"])
def test_a_plugins_bug_at_each_step_leaves_nothing(stand: Stand, step: str) -> None:
    stand.mount()

    class Broken:
        wnodes_api = 1

    def fail(disk: Any = None, vm: Any = None, mount: Any = None, socket_path: Any = None, guest: Any = None) -> None:
        raise RuntimeError("a stranger's bug")

    wanted = {"wnodes_disk_create": "disk", "wnodes_vm_start": "vm", "wnodes_mount_attach": "mount, socket_path, guest"}
    scope: dict[str, Any] = {"fail": fail}
    exec(f"def {step}({wanted[step]}): fail()", scope)
    broken = Broken()
    setattr(broken, step, hookimpl(scope[step]))
    stand.plugins.register(broken, "broken")
    assert not any(found.problem for found in stand.plugins.found)
    with pytest.raises(RuntimeError, match="a stranger's bug"):
        stand.go()
    assert stand.errors == []


def test_the_vms_end_is_noticed_at_once(stand: Stand) -> None:
    async def use(lifecycle: Lifecycle, running: Running) -> None:
        watching = asyncio.ensure_future(lifecycle.watch.ended())
        await asyncio.sleep(0.05)
        assert not watching.done()
        await asyncio.to_thread(processes.kill, running.process)
        await asyncio.wait_for(watching, 2)
        await asyncio.wait_for(lifecycle.watch.ended(), 2)

    assert stand.go(use) == []


def test_the_console_is_quoted_without_control_characters(stand: Stand) -> None:
    lifecycle = Lifecycle(stand.plan, Journal(stand.folder / "journal"), None, Trace(), print)
    lifecycle.journal.close()
    assert lifecycle.watch.last_words() == " and wrote nothing to its console"
    console = Path(stand.plan.console)
    console.write_bytes(b"".join(b"line %d\r\n" % n for n in range(100)) + b"\x1b[31mred\x07\xff\n")
    quoted = lifecycle.watch.last_words().splitlines()
    assert quoted[0] == "; its console ended with"
    assert quoted[1:3] == ["  console: line 93", "  console: line 94"]
    assert len(quoted) == 9
    assert not any(c in lifecycle.watch.last_words() for c in "\x1b\x07\r")
    console.write_bytes(b"early\n" * 50 + b"Kernel panic - not syncing: no root\n" + b" ? address\n" * 60)
    assert lifecycle.watch.last_words().splitlines()[1] == "  console: Kernel panic - not syncing: no root"


def test_undo_of_an_unknown_kind_is_an_error_and_not_silence(stand: Stand) -> None:
    with pytest.raises(WnodesError, match="'volcano', which nothing here can undo"):
        undo_one(Resource("volcano", "etna"), stand.plugins.hook)


def test_undo_goes_on_after_a_failure_and_tells_it(stand: Stand) -> None:
    stand.mount()

    class Stuck:
        wnodes_api = 1
        stuck = True

        @hookimpl
        def wnodes_vm_stop(self, vm: Any) -> bool | None:
            return False if self.stuck else None

    plugin = Stuck()
    stand.plugins.register(plugin, "stuck")
    (error,) = stand.go()
    assert f"VM wnodes-{stand.plan.lease} is still there" in str(error)
    assert stand.lines()[-2:] == ["gone attachment", "gone disk"]
    plugin.stuck = False
    journal = Journal(stand.folder / "journal")
    assert journal.undo(lambda resource: undo_one(resource, stand.plugins.hook)) == []
    journal.close()


def test_an_end_while_the_vm_starts_waits_for_it_so_that_the_undo_sees_it(tmp_path):
    begun, finish = threading.Event(), threading.Event()
    started = []

    def slow_start(vm):
        begun.set()
        finish.wait(10)
        started.append(vm.name)
        return processes.read(os.getpid())

    async def end_meanwhile():
        task = asyncio.ensure_future(to_its_end(lambda: slow_start(SimpleNamespace(name="v"))))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, finish.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert started == ["v"]

    asyncio.run(end_meanwhile())
