"""Clones of a real guest: each is somebody of its own before a job sees it, and its start reads no disk.

The template is built as wnodesd builds it (``wnodes_core.templates.build``), the clones are raised as a
keeper raises them; all siblings live at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import IdentityError
from wnodes_core.guest import identity
from wnodes_core.journal import Journal
from wnodes_core.lifecycle import Lifecycle
from wnodes_core.model import Job, Template, Trace
from wnodes_core.plan import Plan, User
from wnodes_core.plugins import Plugins
from wnodes_core.templates.shelf import MADE

pytestmark = pytest.mark.guest
SIBLINGS = 3
# One line an item. Two random numbers: of the pool, and of the kernel's own batches.
WHO = """
cat /proc/sys/kernel/random/boot_id
cat /etc/machine-id
uname -n
grep 127.0.1.1 /etc/hosts
od -An -N16 -tx1 /dev/urandom
cat /proc/sys/kernel/random/uuid
date +%s.%N
ls /sys/bus/virtio/drivers | grep -x virtio_mem
cat /sys/devices/system/memory/auto_online_blocks
"""
DIFFER = ("boot_id", "machine_id", "name", "hosts", "urandom", "uuid")
ITEMS = (*DIFFER, "clock", "driver", "online")
START = "ls / >/dev/null; bash -c 'test -e /'; python3 -I -c 'import os, shutil, subprocess, sys, time'; sshfs --version >/dev/null"


@pytest.fixture(scope="module")
def plan(minimal_image: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    """The plan of a job on a template that was built for it; the template's builder has ended."""
    folder = tmp_path_factory.mktemp("t")
    job = Job("local", "7", "n0", os.getuid(), os.getgid(), "root")
    user = User.of(os.getuid(), os.getgid())
    plan = Plan(f"t-{os.urandom(4).hex()}", str(folder), job, minimal_image, user, "tcg", 1, 384, (), 120, mount_ports=1)
    given = {"plan": plan.to_dict(), "id": "t-1", "ways": ["mapped"]}
    argv = [sys.executable, "-I", "-m", "wnodes_core.templates.build"]
    done = subprocess.run(argv, input=json.dumps(given).encode(), capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    template = Template.from_dict(json.loads((folder / MADE).read_text()))
    yield replace(plan, template=template, mount_ports=0)


@asynccontextmanager
async def clone(plan: Plan, folder: Path) -> Any:
    """A clone with its user, as a keeper raises it: (its channel, its trace)."""
    folder.mkdir()
    lease = f"t-{os.urandom(4).hex()}"
    plan = replace(plan, lease=lease, folder=str(folder), job=replace(plan.job, job_id=folder.name))
    journal = Journal(folder / "journal")
    lifecycle = Lifecycle(plan, journal, Plugins(scan=False).hook, Trace(), lambda text: pytest.fail(text))
    try:
        running = await lifecycle.start()
        try:
            assert lifecycle.trace.start.kind == "warm"
            yield running.channel, lifecycle.trace
        finally:
            running.channel.close()
            await asyncio.sleep(0)
    finally:
        assert lifecycle.stop() == []
        journal.close()


async def who(channel: Any) -> dict[str, str]:
    began = time.time()
    done = await channel.run(["sh", "-c", WHO])
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(ITEMS), done
    told = dict(zip(ITEMS, lines, strict=True))
    assert began - 0.5 < float(told["clock"]) < time.time() + 0.5
    return told


def test_no_two_siblings_are_the_same(plan: Plan, nothing_left: Path) -> None:
    async def live() -> list[dict[str, str]]:
        async with AsyncExitStack() as stack:
            clones = [
                (await stack.enter_async_context(clone(plan, nothing_left / f"c{n}")))[0] for n in range(SIBLINGS)
            ]
            return [await who(channel) for channel in clones]

    told = asyncio.run(live())
    assert plan.template is not None
    template = plan.template.identity
    for item in DIFFER:
        assert len({each[item] for each in told}) == SIBLINGS, (item, told)
    for n, each in enumerate(told):
        assert each["name"] == f"wn-c{n}-n0" and each["hosts"] == f"127.0.1.1 wn-c{n}-n0"
        assert each["boot_id"] != template["boot_id"] and each["machine_id"] != template["machine_id"]
        assert (each["driver"], each["online"]) == ("virtio_mem", "online"), "it can take more memory"


def test_a_clone_starts_a_job_without_reading_its_disk(plan: Plan, nothing_left: Path) -> None:
    async def live() -> tuple[int, int]:
        async with clone(plan, nothing_left / "c") as (channel, _):
            reads = [int((await channel.run(["sh", "-c", "cat /sys/block/vda/stat"])).stdout.split()[0])]
            assert (await channel.run(["sh", "-c", START])).code == 0
            reads.append(int((await channel.run(["sh", "-c", "cat /sys/block/vda/stat"])).stdout.split()[0]))
            return reads[0], reads[1]

    before, after = asyncio.run(live())
    assert after == before, f"{after - before} reads"


def test_a_clone_that_is_not_who_it_should_be_is_refused(plan: Plan, nothing_left: Path) -> None:
    assert plan.template is not None
    twin = {**plan.template.identity, "host_name": "wn-c-n0"}  # as if the template had had the clone's name
    doubtful = replace(plan, template=replace(plan.template, identity=twin), folder=str(nothing_left), lease="t-c")
    doubtful = replace(doubtful, job=replace(plan.job, job_id="c"))
    journal = Journal(nothing_left / "journal")
    lifecycle = Lifecycle(doubtful, journal, Plugins(scan=False).hook, Trace(), lambda text: None)
    try:
        with pytest.raises(IdentityError, match="host_name is the template's"):
            asyncio.run(lifecycle.clone(doubtful.template))
    finally:
        assert lifecycle.stop() == []
        journal.close()


def test_a_wrong_clock_is_set_and_host_keys_are_made_anew(guest: Any) -> None:
    # The image has ssh-keygen, from sshfs's ssh, and no sshd. To make keys takes an emulated guest seconds.
    guest.run("mkdir -p /etc/ssh; echo old | tee /etc/ssh/ssh_host_ed25519_key /etc/ssh/ssh_host_ed25519_key.pub")
    assert guest.run("date -s @1000000000").code == 0
    template = identity.of(guest.wait(guest.channel.rest(), 120))
    asked = identity.ask("wn-7")
    asked["clock"] = time.time()
    told = guest.wait(guest.channel.request("wake", **asked), 20)
    identity.check(template, asked, told)
    assert abs(int(guest.run("date +%s").stdout) - time.time()) < 3
    assert len(template["ssh_host_keys"]) == 64
    deadline, keys = time.monotonic() + 100, b""
    while b"ed25519_key.pub" not in keys and time.monotonic() < deadline:
        keys = guest.run("grep -lr . /etc/ssh; grep -r old /etc/ssh").stdout
        time.sleep(0.2)
    assert b"ed25519_key.pub" in keys and b":old" not in keys
    assert guest.run("cat /etc/ssh/ssh_host_ed25519_key.pub").stdout.startswith(b"ssh-ed25519 ")


def test_a_template_says_who_it_is(plan: Plan) -> None:
    assert plan.template is not None
    assert identity.of({"identity": plan.template.identity}) == plan.template.identity
    assert len(plan.template.identity["boot_id"]) == 36
