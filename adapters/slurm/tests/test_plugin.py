"""The adapter's translation, on text captured from Slurm 22.05.8 (``captured/``); no Slurm needed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from wnodes_slurm import native, plugin

from wnodes_core.api import Job, NativeCall, Phase, Process, VmRequest, errors

CAPTURED = Path(__file__).with_name("captured")


def text_of(name: str) -> str:
    """A captured text without its heading."""
    return (CAPTURED / name).read_text().partition("\n")[2]


def environ_of(name: str, **changes: str) -> dict[str, str]:
    return {**json.loads((CAPTURED / name).read_text()), **changes}


def prolog(**changes: str) -> NativeCall:
    return NativeCall(Phase.PREPARE, environ=environ_of("prolog-env.json", **changes))


def test_prolog_is_read_into_request_and_facts() -> None:
    read = plugin.wnodes_lrms_read(prolog())
    assert read is not None
    request, job = read
    assert request == VmRequest(image="debian12")
    assert job and (job.job_id, job.node, job.uid, job.user, job.cpus) == ("1", "n0", 2002, "wnodes-t1", 1)
    assert (job.queue, job.work_dir, job.key) == ("main", "/tmp", "slurm-n0-1")


def test_grammar_and_uneven_nodes() -> None:
    read = plugin.wnodes_lrms_read(NativeCall(Phase.PREPARE, environ=environ_of("prolog-env-two-nodes.json")))
    assert read and read[1]
    assert read[0] == VmRequest(image="el9", cpus=2)
    assert read[1].cpus == 0, "1,2 cpus: which node has which only scontrol tells"


def test_the_start_may_stand_alone_and_goes_before_the_grammars() -> None:
    read = plugin.wnodes_lrms_read(prolog(SPANK_VM_START="warm"))
    assert read and read[0] == VmRequest(image="debian12", start="warm")
    read = plugin.wnodes_lrms_read(prolog(SPANK_VM_IMAGE="", SPANK_VM_START="cold", SPANK_VM="start=warm,trace=yes"))
    assert read and read[0] == VmRequest(start="cold", trace="yes")
    read = plugin.wnodes_lrms_read(prolog(SPANK_VM_IMAGE="", SPANK_VM_START="auto"))
    assert read and read[0] == VmRequest(start="auto"), "the site's policy knows the image"


def test_ordinary_job_is_none() -> None:
    assert plugin.wnodes_lrms_read(prolog(SPANK_VM_IMAGE="")) is None


@pytest.mark.parametrize(
    ("constraint", "image"),
    [("vm_el9", "el9"), ("ib&vm_e.2", "e.2"), ("[vm_a*2&x]", "a"), ("(ib|vm_b)&c", "b"), ("novm_x", ""), ("vm", "")],
)
def test_constraint_asks_too(constraint: str, image: str) -> None:
    read = plugin.wnodes_lrms_read(prolog(SPANK_VM_IMAGE="", SLURM_JOB_CONSTRAINTS=constraint))
    assert (read[0].image if read else "") == image


@pytest.mark.parametrize(
    "changes",
    [
        {"SPANK_VM_IMAGE": "../x"},
        {"SPANK_VM_IMAGE": "a b"},
        {"SPANK_VM": "imgae=x"},
        {"SPANK_VM": "image=other"},
        {"SPANK_VM_IMAGE": "", "SLURM_JOB_CONSTRAINTS": "vm_a|vm_b"},
        {"SPANK_VM": "mount=x:/y"},
        {"SPANK_VM_START": "hot"},
        {"SPANK_VM_START": "warm,image=other"},
    ],
)
def test_bad_request_is_the_users_error(changes: dict[str, str]) -> None:
    with pytest.raises(errors.RequestError):
        plugin.wnodes_lrms_read(prolog(**changes))


def test_epilog_names_the_job_even_after_a_bad_request() -> None:
    read = plugin.wnodes_lrms_read(NativeCall(Phase.FINISH, environ=environ_of("epilog-env.json", SPANK_VM="rubbish")))
    assert read and read[1] and read[1].job_id == "1"


def test_user_error_cancels_and_never_drains() -> None:
    reply = plugin.wnodes_lrms_reply(prolog(), errors.UnknownImage("image 'x'\n: no such", hint="try 'y'"), None)
    assert reply.exit_code == 0
    assert reply.commands == (
        ("scontrol", "update", "JobId=1", "AdminComment=wnodes: image 'x' : no such hint: try 'y'"),
        ("scontrol", "notify", "1", "wnodes: image 'x' : no such hint: try 'y'"),
        ("scancel", "1"),
    )


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("kind", [None, errors.WnodesError, errors.BadRequest, errors.HostBusy, errors.HostError])
def test_only_a_sick_host_in_a_prolog_drains(phase: Phase, kind: type[errors.WnodesError] | None) -> None:
    for environ in ({}, environ_of("prolog-env.json")):
        error = kind("what") if kind else None
        reply = plugin.wnodes_lrms_reply(NativeCall(phase, environ=environ), error, None)
        drains = phase is Phase.PREPARE and kind is errors.HostError
        assert (reply.exit_code == plugin.EXIT_DRAIN) == drains
        if phase in (Phase.PREPARE, Phase.FINISH, Phase.ADVERTISE) and not drains:
            assert reply.exit_code == 0
        if phase is Phase.PREPARE and error and not drains:
            assert reply.commands[-1][0] == "scancel"


def test_second_requeue_becomes_a_cancel() -> None:
    first = plugin.wnodes_lrms_reply(prolog(), errors.HostBusy("full"), None)
    second = plugin.wnodes_lrms_reply(prolog(SLURM_JOB_RESTART_COUNT="1"), errors.HostBusy("full"), None)
    assert ("scontrol", "requeue", "1") in first.commands
    assert ("scontrol", "requeue", "1") not in second.commands


@pytest.mark.parametrize(("node", "cpus"), [("n0", 1), ("n1", 2)])
def test_facts_are_those_of_the_own_node(node: str, cpus: int) -> None:
    job = plugin.wnodes_lrms_facts_parse(Job("slurm", "2", node, 0, 0, ""), text_of("scontrol-job-two-nodes.txt"))
    assert (job.cpus, job.memory_mib, job.queue) == (cpus, 100, "main")


def test_facts_of_another_job_or_node_are_refused() -> None:
    text = text_of("scontrol-job-two-nodes.txt")
    for job_id, node in (("2", "n2"), ("3", "n0")):
        with pytest.raises(errors.TransientError):
            native.facts_from(Job("slurm", job_id, node, 0, 0, ""), text)


@pytest.mark.parametrize("field", ["JobName=job", "WorkDir=/tmp", "Command=/lab"])
def test_a_users_words_are_never_facts(field: str) -> None:
    """Slurm prints names and paths raw: a forged block makes two, and two are refused."""
    forged = " JOB_GRES=(null)   Nodes=n0 CPU_IDs=0-63 Mem=999999 GRES=   MinCPUsNode=1"
    text = text_of("scontrol-job-one-node.txt")
    assert field in text
    with pytest.raises(errors.BadRequest, match="want other words"):
        native.facts_from(Job("slurm", "1", "n0", 0, 0, ""), text.replace(field, field + forged))


def test_titles_sockets_and_live_jobs() -> None:
    titles = [ast.literal_eval(line.partition(" ")[2]) for line in text_of("slurmstepd-titles.txt").splitlines()]
    assert {native.step_of(title) for title in titles} >= {("2", "extern"), ("2", "batch"), ("2", "0")}
    rows = text_of("proc-net-unix.txt")
    inodes = frozenset(line.split()[6] for line in rows.splitlines()[1:])
    nodes = {native.node_of(path, "2") for path in native.sockets_of(rows, inodes)}
    assert nodes >= {"n0", "n1"}
    assert plugin.wnodes_lrms_live_parse(text_of("squeue-node.txt")) == frozenset(text_of("squeue-node.txt").split())


@pytest.mark.parametrize("words", [("bash",), ("slurmstepd: [x.batch]",), ("x slurmstepd: [1.batch]",), (), ("",)])
def test_other_titles_are_nobodys(words: tuple[str, ...]) -> None:
    assert native.step_of(words) is None
    assert plugin.wnodes_lrms_owner([Process(1, 0, 0, 1, "/usr/bin/bash", words)]) is None


def test_advertise_needs_to_know_the_sites_features() -> None:
    shown = text_of("scontrol-node.txt").replace("AvailableFeatures=(null)", "AvailableFeatures=ib,vm,vm_old")
    assert plugin.wnodes_lrms_advertise("n0", {"images": ["a"]}) == ()
    (argv,) = plugin.wnodes_lrms_advertise("n0", {"images": ["b", "a"], "published": shown})
    assert argv == (
        "scontrol", "update", "NodeName=n0", "AvailableFeatures=ib,vm,vm_a,vm_b", "ActiveFeatures=ib,vm,vm_a,vm_b"
    )  # fmt: skip
    assert plugin.wnodes_lrms_advertise("n0", {"images": ["old"], "published": shown}) == ()


def test_advertise_tells_which_images_start_warm_and_leaves_a_sites_warm_aisle() -> None:
    def published(features: str, images: list[str], templates: list[str]) -> str:
        shown = text_of("scontrol-node.txt").replace("AvailableFeatures=(null)", f"AvailableFeatures={features}")
        told = plugin.wnodes_lrms_advertise("n0", {"images": images, "templates": templates, "published": shown})
        return told[0][-1] if told else "as it is"

    assert published("warm_aisle", ["b", "a"], ["b", "gone"]) == "ActiveFeatures=warm_aisle,vm,vm_a,vm_b,warm_b"
    assert published("warm_aisle,vm,vm_a,vm_b,warm_b", ["a", "b"], ["b"]) == "as it is"
    assert published("warm_aisle,vm,vm_a,vm_b,warm_b", ["a", "b"], []) == "ActiveFeatures=warm_aisle,vm,vm_a,vm_b"
    assert published("warm_aisle,vm,vm_b,warm_b", ["a"], []) == "ActiveFeatures=warm_aisle,vm,vm_a"


def test_networks_that_a_node_carries_are_features_and_go_with_it() -> None:
    plain = text_of("scontrol-node.txt")
    shown = plain.replace("AvailableFeatures=(null)", "AvailableFeatures=ib,vm,vmnet_far")
    (argv,) = plugin.wnodes_lrms_advertise("n0", {"images": ["a"], "networks": ("lan",), "published": shown})
    assert argv[-1] == "ActiveFeatures=ib,vm,vm_a,vmnet_lan"
