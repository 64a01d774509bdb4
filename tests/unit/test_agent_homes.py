"""Which cgroups a VM moves into, told from texts of /proc; the moves are in the integration tests."""

from __future__ import annotations

import pytest

from wnodes_core.agent import homes
from wnodes_core.agent.homes import Target

V1_MOUNTS = """\
30 20 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
"""
V2_MOUNTS = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(step: str, freezer: str = "") -> list[homes.Hierarchy]:
    base = "/slurm/uid_7/job_7"
    freezer = freezer or f"{base}/{step}"
    text = f"5:memory:{base}/{step}\n4:cpu,cpuacct:/\n3:freezer:{freezer}\n1:name=systemd:/slurmd\n"
    return homes.hierarchies(1, V1_MOUNTS, text)


def v2(path: str) -> list[homes.Hierarchy]:
    return homes.hierarchies(1, V2_MOUNTS, f"0::{path}\n")


def test_v1_joins_the_home_in_all_but_freezer_and_has_a_freezer_group_of_its_own():
    assert homes.targets(v1("step_0"), v1("step_extern"), "slurm-n0-7-abc", "7") == [
        Target("/sys/fs/cgroup/memory/slurm/uid_7/job_7/step_extern"),
        Target("/sys/fs/cgroup/cpu,cpuacct"),
        Target("/sys/fs/cgroup/systemd/slurmd"),
        Target("/sys/fs/cgroup/freezer/wnodes/slurm-n0-7-abc", make=True),
    ]


def test_v1_without_a_home_gets_a_child_of_the_jobs_group_and_not_of_the_uids():
    assert homes.targets(v1("step_0"), [], "ID", "7") == [
        Target("/sys/fs/cgroup/memory/slurm/uid_7/job_7/wnodes", make=True),
        Target("/sys/fs/cgroup/freezer/wnodes/ID", make=True),
    ]


def test_a_job_id_that_only_begins_another_is_not_mistaken_for_it():
    assert homes.targets(v1("step_0"), [], "ID", "77") == []


def test_v2_gets_a_group_beside_the_home():
    home = v2("/system.slice/slurmstepd.scope/job_7/step_extern")
    assert homes.targets(v2("/x"), home, "ID", "7") == [
        Target("/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/wnodes", make=True)
    ]


def test_v2_without_a_home_gets_a_child_of_the_jobs_group():
    assert homes.targets(v2("/scope/job_7/step_0/user"), [], "ID", "7") == [
        Target("/sys/fs/cgroup/scope/job_7/wnodes", make=True)
    ]


def test_no_group_at_all_is_said_by_an_empty_list():
    assert homes.targets(v2("/user.slice"), [], "ID", "7") == []


def test_only_groups_of_ours_are_ever_removed(tmp_path):
    with pytest.raises(OSError, match="not a group of ours"):
        homes.remove(str(tmp_path))
    homes.remove(str(tmp_path / "wnodes"))  # absent is fine
    (tmp_path / "wnodes" / "ID").mkdir(parents=True)
    homes.remove(str(tmp_path / "wnodes" / "ID"))
    assert not (tmp_path / "wnodes").exists()
