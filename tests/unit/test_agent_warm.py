"""wnodesd's templates and pool where they fail: what a lease is told, what is tried again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core.agent import admitting, slots
from wnodes_core.agent.pool import Pool
from wnodes_core.agent.warm import Warm
from wnodes_core.errors import BootTimeout, HostBusy, SettingsError
from wnodes_core.model import Job, Owner, Process, VmRequest

FREE = range(64950, 64952)


async def _at_once(work: Any, *arguments: Any) -> Any:
    return work(*arguments)


def _daemon(state_dir: Path, **more: Any) -> Any:
    settings = SimpleNamespace(
        state_dir=str(state_dir),
        warm=SimpleNamespace(pool=(), pool_min_free_mib=0, pool_uids="64950-64951"),
        storage=SimpleNamespace(order=("sshfs",)),
    )
    parts = SimpleNamespace(store=SimpleNamespace(release=lambda name: None), backend=lambda: None)
    return SimpleNamespace(
        settings=settings, parts=parts, leases={}, undoer=SimpleNamespace(), quick=_at_once, slow=_at_once, **more
    )


class Builder:
    def build(self, wanted: Any) -> None:
        raise BootTimeout("it never answered")


def _chooser(wanted: list[Any]) -> Any:
    return SimpleNamespace(wanted=lambda *_: wanted, find=lambda *_: None, builder=lambda accel: Builder())


@pytest.mark.parametrize(("start", "told"), [("warm", "BootTimeout"), ("", "")])
def test_a_start_that_had_to_be_warm_says_what_became_of_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, told: str
) -> None:
    lease: Any = SimpleNamespace(id="l1", request=VmRequest(start=start), no_clone="", progress="")
    wanted = SimpleNamespace(id="w", base_mib=1, image=SimpleNamespace(name="deb"))
    monkeypatch.setattr(Warm, "_chooser", lambda self: _chooser([wanted]))
    monkeypatch.setattr(Warm, "_size", lambda self, lease, accel: None)

    async def choose() -> None:
        warm = Warm(_daemon(tmp_path))
        for _ in range(2):  # the second is not built again, and told the same
            assert await warm.choose(lease, None, "tcg") is None  # type: ignore[arg-type]

    asyncio.run(choose())
    assert lease.no_clone == told


def test_a_slot_that_could_not_be_ended_is_tried_again_and_its_uid_is_not_used_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool" / "64950-abcd").mkdir(parents=True)
    survive = [False, True]
    monkeypatch.setattr(slots, "end_all_of", lambda uid: survive.pop(0))

    async def rounds() -> list[int]:
        pool = Pool(_daemon(tmp_path), None)  # type: ignore[arg-type]
        free = []
        for _ in range(2):
            await pool._round()
            free.append(pool._free_uid(FREE))
        return free

    assert asyncio.run(rounds()) == [64951, 64950]
    assert not list((tmp_path / "pool").iterdir())


def test_a_slot_of_a_lease_or_of_one_that_is_being_ended_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool" / "64950-abcd").mkdir(parents=True)
    ended: list[int] = []
    monkeypatch.setattr(slots, "end_all_of", ended.append)

    async def one_round() -> None:
        pool = Pool(_daemon(tmp_path), None)  # type: ignore[arg-type]
        pool._busy.add(64950)
        await pool._round()

    asyncio.run(one_round())
    assert ended == []


def test_a_slots_number_is_no_groups_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="is the group 'staff'"):
        slots.check_account(50)


def test_a_forged_claim_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    """A process with another job's id in its environment is asked about for seconds; the job's own goes ahead."""
    forging = asyncio.Event()

    class Slow(admitting.Admitting):
        async def _claimed(self, peer: Any, lrms: str, owner: Owner) -> Job:
            return Job(lrms, owner.job_id, owner.node, peer.uid, peer.uid, "")

        async def admit(self, job: Job, request: VmRequest, *, owner: Owner | None = None) -> Any:
            if job.uid == 666:
                forging.set()
                await asyncio.sleep(30)
                raise HostBusy("never confirmed")
            return SimpleNamespace(job=job)

    async def race() -> None:
        slow = Slow(_daemon(tmp_path, find=lambda *place: None), None)  # type: ignore[arg-type]
        owner = Owner("7", "batch", Process(1, 0, 0, 1, "", ()), True, "n0")
        evil, good = SimpleNamespace(uid=666), SimpleNamespace(uid=1000)
        forged = asyncio.ensure_future(slow.claim(evil, "lsf", owner, ""))  # type: ignore[arg-type]
        await forging.wait()
        assert slow.claiming(evil, "lsf", owner) and not slow.claiming(good, "lsf", owner)  # type: ignore[arg-type]
        lease = await asyncio.wait_for(slow.claim(good, "lsf", owner, ""), 2)  # type: ignore[arg-type]
        assert lease.job.uid == 1000
        forged.cancel()

    asyncio.run(race())
