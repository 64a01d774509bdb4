"""The pool under a real Slurm: clones that wait, jobs that take them over, and what harm can do to either."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from second_account import Second
from slurm_site import Site, until

from wnodes_core import processes
from wnodes_core.model import Image, Process

pytestmark = [pytest.mark.slurm, pytest.mark.guest]
UIDS = range(64100, 64108)
SETTINGS = """pool
  base_memory_mib: 256
  pool_uids: 64100-64107
  pool_min_free_mib: 512
  pool:
    - image: debian12
      count: 2"""
WHO = """cat /proc/sys/kernel/random/boot_id; hostname; id -u; free -m | awk '/^Mem/ {print $2}'
touch made-$SLURM_JOB_ID; while [ -e hold-$1 ]; do sleep 0.1; done"""


@pytest.fixture(scope="module")
def second() -> Iterator[Second]:
    with Second() as second:
        yield second


@pytest.fixture(scope="module")
def site(minimal_image: Image, second: Second) -> Iterator[Site]:
    with Site(minimal_image, "p", build=SETTINGS, settings=f"policy:\n{second.rules()}") as site:
        yield site


def _of_slots() -> list[Process]:
    return [each for each in processes.table() if each.uid in UIDS]


def _is_keeper(process: Process) -> bool:
    return "wnodes_core.pool.keeper" in process.command


def _waiting(site: Site) -> list[Process]:
    """The keepers that wait, as root, of this site's wnodesd."""
    daemon = site.daemon.pid if site.daemon else 0
    return [each for each in processes.table() if each.uid == 0 and _is_keeper(each) and each.parent == daemon]


def _full(site: Site) -> list[Process]:
    def full() -> bool:
        with_vm = {_slot_uid(each) for each in _of_slots() if not _is_keeper(each)}
        return len(_waiting(site)) == 2 and len(with_vm) >= 2 and len(_idle_names(site)) == 2

    until(full, "two slots that wait", 120)
    return _waiting(site)


def _idle_names(site: Site) -> set[str]:
    """As the log says it: those that wait and were not lost or taken since are the youngest two."""
    folder = site.folder / "state/pool"
    return {path.name for path in folder.iterdir() if path.stat().st_uid in UIDS} if folder.exists() else set()


def _slot_uid(process: Process) -> int:
    return process.uid


def _status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


def _finished(site: Site, job: str) -> list[str]:
    end = site.ended(job)
    assert end["JobState"] == "COMPLETED", (end, site.output(job), site.log()[-3000:])
    return site.output(job).splitlines()


def test_jobs_take_clones_that_waited_and_grow_them(site: Site, second: Second) -> None:
    """And a pilot becomes another account in one whose QEMU is the slot's: three users at one VM's ports."""
    _full(site)
    runs = []
    for options in ((), ("--mem-per-cpu=1500",)):
        job = site.submit(f"{WHO}\n{second.script}", *options)
        runs.append(_finished(site, job))
        second.check(site, job, runs[-1])
        lease = site.lease(job)
        assert lease["start"]["kind"] == "pool" and not lease["start"]["fallback"], (lease, site.log()[-3000:])
        assert (site.work / f"made-{job}").stat().st_uid == site.work.stat().st_uid
        _full(site)
    assert runs[0][0] != runs[1][0], "boot ids"
    assert runs[0][1] != runs[1][1], "host names"
    assert int(runs[1][3]) > int(runs[0][3]) + 600, runs


def test_a_clone_that_waited_is_given_scratch_by_another_user_than_its_own(site: Site) -> None:
    """QEMU is the slot's user and the file is the job's: it goes by its open descriptor."""
    _full(site)
    job = site.submit("df -m /tmp | tail -1; stat -f -c %T /tmp; echo x >/tmp/y", "--vm=image=debian12,scratch=100M", image="")
    lines = _finished(site, job)
    assert 80 < int(lines[0].split()[1]) < 101 and lines[1] == "ext2/ext3", lines
    start = site.lease(job)["start"]
    assert start["kind"] == "pool" and not start["fallback"], (start, site.log()[-3000:])
    assert not list(site.folder.rglob("scratch*"))


def test_a_claimed_keeper_is_the_user_and_nothing_else(site: Site) -> None:
    waiting = {each.pid for each in _full(site)}
    hold = site.work / "hold-a"
    hold.touch()
    job = site.submit(WHO.replace("$1", "a"))
    try:
        lease = site.wait_running(job)
        keeper = processes.read(lease["keeper_pid"])
        assert keeper and keeper.pid in waiting, "the keeper that waited, and no other"
        uid = site.work.stat().st_uid
        status = _status(keeper.pid)
        assert status["Uid"] == [str(uid)] * 4 and "0" not in status["Gid"] + status["Groups"], status
        assert {status[name][0].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}, status
        for link in Path(f"/proc/{keeper.pid}/fd").iterdir():
            where = os.readlink(link)
            rooted = where.startswith("/") and os.stat(link).st_uid == 0 and where != "/dev/null"
            # Every keeper of a clone holds its template's sealed memory, to clone it itself if need be.
            assert not rooted or where.startswith("/memfd:wnodes-"), f"{link} -> {where}"
        vm = [each for each in _of_slots() if each.command[0].endswith("qemu-system-x86_64")]
        assert vm and all(_status(each.pid)["Uid"] == [str(each.uid)] * 4 for each in vm)
        assert len({each.uid for each in vm}) == len(vm), "no two slots share an account"
    finally:
        hold.unlink()
    _finished(site, job)


def test_a_user_gets_at_no_keeper_that_waits_and_at_no_slot(site: Site) -> None:
    for keeper in _full(site):
        for attack in (["kill", "-9", str(keeper.pid)], ["cat", f"/proc/{keeper.pid}/mem"], ["ls", f"/proc/{keeper.pid}/fd"]):
            assert site.run_as(attack, check=False).exit_code != 0, attack
        assert processes.alive(keeper)
    for name in _idle_names(site):
        assert site.run_as(["ls", f"{site.folder}/state/pool/{name}"], check=False).exit_code != 0


@pytest.mark.parametrize("victim", ["keeper", "warden", "qemu"])
def test_what_dies_while_it_waits_is_replaced(site: Site, victim: str) -> None:
    keepers = _full(site)
    one = keepers[0]
    below = [each for each in _of_slots() if each.parent == one.pid]
    uid = below[0].uid
    mine = [each for each in _of_slots() if each.uid == uid]
    qemu = next(each for each in mine if each.parent == below[0].pid)  # an earlier slot's may still be a zombie
    processes.kill({"keeper": one, "warden": below[0], "qemu": qemu}[victim])
    until(lambda: not any(processes.alive(each) for each in (one, *mine)), "end of the whole slot")
    _full(site)


@pytest.mark.parametrize("victim", ["keeper", "qemu"])
def test_what_dies_while_a_job_runs_ends_the_job_and_leaves_nothing(site: Site, victim: str) -> None:
    _full(site)
    hold = site.work / "hold-b"
    hold.touch()
    job = site.submit(WHO.replace("$1", "b"))
    try:
        lease = site.wait_running(job)
        assert lease["start"]["kind"] == "pool"
        keeper = processes.read(lease["keeper_pid"])
        assert keeper
        mine = [each for each in _of_slots() if each.parent == keeper.pid]
        qemu = [each for each in _of_slots() if mine and each.uid == mine[0].uid and not _is_keeper(each)]
        assert mine and qemu
        processes.kill(keeper if victim == "keeper" else qemu[0])
        assert site.ended(job)["JobState"] != "COMPLETED"
        until(lambda: not any(map(processes.alive, (keeper, *mine, *qemu))), "end of the lease's processes")
    finally:
        hold.unlink()
    until(lambda: not any((site.folder / "state/leases").iterdir()), "end of the lease's folder")


def test_a_keeper_that_does_not_answer_costs_a_job_its_slot_and_no_more(site: Site) -> None:
    stopped = _full(site)
    for keeper in stopped:
        os.kill(keeper.pid, signal.SIGSTOP)
    job = site.submit(WHO)
    _finished(site, job)
    start = site.lease(job)["start"]
    assert start["kind"] == "warm" and start["fallback"], (start, site.log()[-3000:])
    for keeper in stopped:
        processes.kill(keeper)
    _full(site)


def test_a_killed_wnodesd_leaves_no_slot_and_the_next_fills_anew(site: Site) -> None:
    old = [*_full(site), *_of_slots()]
    site.stop_wnodesd(signal.SIGKILL)
    until(lambda: not any(map(processes.alive, old)), "end of what waited for a wnodesd that is gone")
    site.start_wnodesd()
    _full(site)
    assert len(_finished(site, site.submit(WHO))) == 4
    _full(site)
