"""A lease whose plan names a template, with the fake backend and the real agent: clone, or boot instead."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import lifecycle as lifecycle_module
from wnodes_core.backends import fake
from wnodes_core.errors import RequestError
from wnodes_core.files import remove_tree
from wnodes_core.guest import identity
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle, Running
from wnodes_core.model import Template, Trace
from wnodes_core.templates import build

sys.path.insert(0, str(Path(__file__).parent))
from lease_kit import Stand  # noqa: E402


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    """A template that the builder's own code made of a fake guest."""
    folder = Path(tempfile.mkdtemp(prefix="wnt-"))
    stand = Stand(folder)
    plan = replace(stand.plan, mount_ports=2)
    journal = Journal(folder / "journal")
    made = Lifecycle(plan, journal, stand.plugins.hook, Trace(), print)
    blank = build.disks.blank_for
    build.disks.blank_for = lambda _disk, path: Path(path).touch()  # type: ignore[assignment]
    try:
        yield asyncio.run(build.build(made, "t", "mapped"))
    finally:
        build.disks.blank_for = blank
        made.stop()
        shutil.rmtree(folder)


@pytest.fixture
def stand(template: Template) -> Iterator[Stand]:
    folder = Path(tempfile.mkdtemp(prefix="wnl-"))
    stand = Stand(folder)
    stand.plan = replace(stand.plan, template=template)
    yield stand
    left = stand.left()
    fake.wnodes_vm_stop(vm=stand.plan.vm(()))
    remove_tree(folder)
    assert not left, "\n".join(left)


def phases(stand: Stand) -> list[str]:
    return [step.name for step in stand.trace.steps]


def works(stand: Stand) -> None:
    """The lease comes up, runs a command, and goes."""

    async def use(_: Lifecycle, running: Running) -> None:
        assert (await running.channel.run(["echo", "hi"])).stdout == b"hi\n"

    assert stand.go(use) == []


def test_a_clone_has_the_journal_of_any_vm_and_is_told_in_the_trace(stand: Stand) -> None:
    stand.mount(count=2)
    works(stand)
    up = ["disk", "vm", "attachment", "attachment"]
    assert sorted(stand.lines()) == sorted(f"{op} {kind}" for kind in up for op in ("making", "made", "gone"))
    assert phases(stand)[:5] == ["overlay", "clone", "wake", "agent", "mount"]
    assert (stand.trace.start.kind, stand.trace.start.template, stand.trace.start.fallback) == ("warm", "t", "")
    assert stand.said == []


@pytest.mark.parametrize(
    ("fault", "kind"), [("clone-dies", "TransientError"), ("clone-silent", "BootTimeout"), ("clone-garbage", "ChannelLost")]
)
def test_whatever_a_clone_does_wrong_the_job_is_booted_once(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, fault: str, kind: str
) -> None:
    monkeypatch.setattr(lifecycle_module, "CLONE_TIMEOUT_S", 2.0)
    stand.fault(fault)
    works(stand)
    assert "boot" in phases(stand)
    assert (stand.trace.start.kind, stand.trace.start.fallback) == ("cold", kind)
    assert stand.said[0].startswith("no clone: ") and stand.said[0].endswith("; booting instead")
    assert stand.lines().count("making vm") == 2 == stand.lines().count("gone vm")


Lie = Callable[[dict[str, Any], Template], None]
LIES: dict[str, Lie] = {
    "the template's boot id": lambda told, template: told["identity"].update(boot_id=template.identity["boot_id"]),
    "the template's random number": lambda told, template: told["identity"].update(random=template.identity["random"]),
    "another host name": lambda told, template: told["identity"].update(host_name="other"),
    "no identity": lambda told, template: told.pop("identity"),
    "a clock an hour ahead": lambda told, template: told.update(clock=told["clock"] + 3600),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_double_never_sees_the_job(
    stand: Stand, template: Template, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real = identity.check

    def check(of_template: Any, asked: Any, told: Any, *rest: Any) -> Any:
        LIES[lie](told, template)
        return real(of_template, asked, told, *rest)

    monkeypatch.setattr(identity, "check", check)
    works(stand)
    assert stand.trace.start.fallback == "IdentityError"
    assert phases(stand).index("boot") < phases(stand).index("agent")


def test_a_mistake_of_the_requests_is_none_of_the_clones(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Lifecycle, channel: Any) -> None:
        raise RequestError("no such folder")

    monkeypatch.setattr(Lifecycle, "_set_up", refuse)
    with pytest.raises(RequestError):
        stand.go()
    assert "boot" not in phases(stand)


def test_a_template_that_went_meanwhile_is_no_clone(stand: Stand, template: Template) -> None:
    stand.plan = replace(stand.plan, template=replace(template, folder="/gone", memory="/gone/memory"))
    works(stand)
    assert stand.trace.start.kind == "cold" and stand.trace.start.fallback
