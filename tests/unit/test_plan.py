"""The plan: the guest's size, its name, and its way through JSON."""

import json
import os
from dataclasses import asdict

import pytest

from wnodes_core import plan as plan_module
from wnodes_core.errors import LimitExceeded, RequestError
from wnodes_core.model import Boot, Image, Job, Mount, VmRequest
from wnodes_core.plan import OVERHEAD_MIB, Plan, User, guest_memory_mib, make, vm_from_dict
from wnodes_core.settings import Settings

IMAGE = Image("deb", "1", "sha256:" + "0" * 64, "/s/base", "qcow2", boot=Boot("/k", "/i", "root=/dev/vda"))
JOB = Job("slurm", "12_3", "n0", os.getuid(), os.getgid(), "root", cpus=2, memory_mib=2000)


def test_guest_memory_is_the_job_s_less_the_overhead():
    assert guest_memory_mib(VmRequest(), JOB, Settings(), "tcg") == 2000 - OVERHEAD_MIB["tcg"]
    assert guest_memory_mib(VmRequest(memory_mib=1000), JOB, Settings(), "kvm") == 1000 - OVERHEAD_MIB["kvm"]


def test_without_a_limit_the_wish_is_the_guest_s_own_size():
    job = Job("local", "1", "n", 0, 0, "root")
    assert guest_memory_mib(VmRequest(memory_mib=300), job, Settings(), "tcg") == 300
    assert guest_memory_mib(VmRequest(), job, Settings(), "tcg") == plan_module.DEFAULT_MEMORY_MIB


def test_a_job_too_small_for_a_vm_is_told_how_much_it_takes():
    job = Job("slurm", "1", "n", 0, 0, "root", memory_mib=300)
    with pytest.raises(LimitExceeded) as caught:
        guest_memory_mib(VmRequest(), job, Settings(), "tcg")
    assert f"at least {OVERHEAD_MIB['tcg'] + 128} MiB" in caught.value.hint


def test_a_plan_survives_json_and_so_does_its_vm():
    made = make(VmRequest(mounts=(Mount("/a", "/b", True),)), JOB, IMAGE, Settings(), "tcg", lease="l", folder="/f")
    plan = Plan.from_dict(json.loads(json.dumps(made)))
    assert plan.to_dict() == make(VmRequest(mounts=(Mount("/a", "/b", True),)), JOB, IMAGE, Settings(), "tcg", lease="l", folder="/f")
    assert plan.cpus == 2 and plan.image.boot == IMAGE.boot
    vm = plan.vm((0, 1))
    assert [c.name for c in vm.channels] == ["org.wnodes.agent.0", "org.wnodes.mount.0"]
    assert vm_from_dict(json.loads(json.dumps(asdict(vm)))) == vm


def test_the_host_name_is_legal_whatever_the_job_is_called():
    plan = Plan.from_dict(make(VmRequest(), JOB, IMAGE, Settings(), "tcg", lease="l", folder="/f"))
    assert plan.host_name == "wn-12-3-n0"


def test_the_user_brings_all_groups(mocker):
    mocker.patch("os.getgrouplist", return_value=[os.getgid(), 99999])
    assert User.of(os.getuid(), os.getgid()).groups["gid99999"] == 99999
    with pytest.raises(RequestError, match="uid 54321 has no account"):
        User.of(54321, 1)
