"""Policy: whose rules count, what they allow, and which mounts a guest gets in which order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wnodes_core import policy
from wnodes_core.errors import (
    BadRequest,
    BrokenPlugin,
    ImageDenied,
    LimitExceeded,
    MountDenied,
    RequestError,
    WnodesError,
)
from wnodes_core.markers import hookimpl
from wnodes_core.model import Job, Mount, VmRequest
from wnodes_core.plugins import Plugins
from wnodes_core.policy import Person
from wnodes_core.settings import Rule, Settings

JOB = Job("slurm", "12", "n0", 1000, 1000, "ann", cpus=4, memory_mib=4096, queue="long", account="proj")
ANN = Person("/home/ann", ("staff", "atlas"))


def admit(request: str | VmRequest, *rules: Rule, job: Job = JOB, hook: Any = None) -> VmRequest:
    """``policy.admit`` with these rules and Ann's account."""
    wish = VmRequest.parse(request) if isinstance(request, str) else request
    return policy.admit(wish, job, Settings(policy=rules), hook, person_of=lambda job: ANN)


def targets(request: VmRequest) -> list[str]:
    return [mount.target for mount in request.mounts]


@pytest.mark.parametrize(
    "rule, matches",
    [
        (Rule(), True),
        (Rule(users=("bob", "ann")), True),
        (Rule(users=("a*",)), True),
        (Rule(users=("bob",)), False),
        (Rule(groups=("atlas",)), True),
        (Rule(groups=("cms",)), False),
        (Rule(queues=("lo?g",)), True),
        (Rule(queues=("short",)), False),
        (Rule(accounts=("proj",)), True),
        (Rule(users=("ann",), accounts=("other",)), False),
    ],
)
def test_a_rule_matches_when_each_of_its_lists_does(rule: Rule, matches: bool) -> None:
    found = policy.rule_for(JOB, [replace(rule, max_cpus=3)], lambda: ANN)
    assert found.max_cpus == (3 if matches else 0)


def test_rules_that_match_add_up_and_later_ones_win() -> None:
    rules = (
        Rule(default_image="el8", max_cpus=8, images=("el*",), mounts=("/cvmfs",), max_memory_mib=100),
        Rule(users=("bob",), default_image="bad", images=("bad",), mounts=("/bad",)),
        Rule(default_image="el9", max_cpus=2, images=("debian*",), mounts=("/cvmfs", "/sw"), allow_mounts=("/data",)),
    )
    assert policy.rule_for(JOB, rules, lambda: ANN) == Rule(
        default_image="el9",
        max_cpus=2,
        max_memory_mib=100,
        images=("el*", "debian*"),
        mounts=("/cvmfs", "/sw"),
        allow_mounts=("/data",),
    )


def test_the_user_database_is_asked_only_when_a_rule_needs_it() -> None:
    def slow(job: Job) -> Person:
        raise AssertionError("asked")

    plain = Settings(policy=(Rule(users=("ann",), mounts=("/sw/{user}",)),))
    assert targets(policy.admit(VmRequest(image="el9"), JOB, plain, person_of=slow)) == ["/sw/ann"]
    with pytest.raises(AssertionError, match="asked"):
        policy.admit(VmRequest(image="el9"), JOB, Settings(policy=(Rule(groups=("x",)),)), person_of=slow)


def test_look_up_knows_root_and_refuses_strangers() -> None:
    found = policy.look_up(replace(JOB, uid=0, gid=0))
    assert found.home == "/root" and "root" in found.groups
    with pytest.raises(RequestError, match="uid 123456789 has no account"):
        policy.look_up(replace(JOB, uid=123456789))


def test_default_image() -> None:
    assert admit("cpus=1", Rule(default_image="el9:1")).image == "el9:1"
    assert admit("image=el8", Rule(default_image="el9:1")).image == "el8"
    with pytest.raises(BadRequest, match="no default for you"):
        admit("cpus=1")


@pytest.mark.parametrize(
    "image, patterns, allowed",
    [
        ("el9", None, True),
        ("el9", (), False),
        ("el9", ("el9",), True),
        ("el9:1", ("el9",), True),
        ("el9:1", ("el*",), True),
        ("el9:1", ("el9:1",), True),
        ("el9:2", ("el9:1",), False),
        ("el9", ("el9:1",), False),
        ("el9", ("el9:*",), True),
        ("el10", ("el9",), False),
        ("el9x", ("el9",), False),
        ("el9@sha256:" + "a" * 64, ("el9",), True),
    ],
)
def test_images(image: str, patterns: tuple[str, ...] | None, allowed: bool) -> None:
    if allowed:
        assert admit(VmRequest(image=image), Rule(images=patterns)).image == image
    else:
        with pytest.raises(ImageDenied, match="is not allowed for you here: want one of"):
            admit(VmRequest(image=image), Rule(images=patterns))


@pytest.mark.parametrize(
    "request_text, words",
    [
        ("image=a,cpus=5", "cpus 5 asked for, the job has 4 on this node"),
        ("image=a,memory=5G", "memory 5120 MiB asked for, the job has 4096 MiB"),
        ("image=a,cpus=3", "cpus 3 asked for, the site allows a VM 2"),
        ("image=a,memory=3G", "memory 3072 MiB asked for, the site allows a VM 2048 MiB"),
        ("image=a,memory=64M", "memory 64 MiB asked for, a VM needs at least 128 MiB"),
    ],
)
def test_a_wish_beyond_a_limit_names_both_numbers(request_text: str, words: str) -> None:
    with pytest.raises(LimitExceeded, match=words):
        admit(request_text, Rule(max_cpus=2, max_memory_mib=2048))


def test_what_nobody_wished_for_is_capped_by_the_site_and_else_left_to_the_job() -> None:
    assert admit("image=a") == VmRequest(image="a")
    capped = admit("image=a", Rule(max_cpus=2, max_memory_mib=2048))
    assert (capped.cpus, capped.memory_mib) == (2, 2048)
    assert admit("image=a", Rule(max_cpus=8)).cpus is None


def test_limits_of_a_job_whose_size_is_unknown() -> None:
    unknown = replace(JOB, cpus=0, memory_mib=0)
    assert admit("image=a,cpus=64,memory=1T", job=unknown).cpus == 64
    with pytest.raises(LimitExceeded, match="site allows"):
        admit("image=a,cpus=64", Rule(max_cpus=8), job=unknown)


@pytest.mark.parametrize(
    "source, allowed",
    [
        ("/data", True),
        ("/data/x/y", True),
        ("/database", False),
        ("/", False),
        ("/home/ann", True),
        ("/home/ann/w", True),
        ("/home/anna", False),
        ("/home/bob", False),
        ("/scratch/ann/1", True),
        ("/scratch/bob", False),
        ("/odd:dir/x", True),
        ("/odd", False),
        ("/data/./x//y", True),
    ],
)
def test_mounts_lie_within_what_the_site_allows(source: str, allowed: bool) -> None:
    rule = Rule(allow_mounts=("/data/", "~", "/scratch/{user}", "/odd:dir"))
    mount = Mount.parse(source.replace(":", "\\:") + ":/mnt/x")
    if allowed:
        assert targets(admit(VmRequest(image="a", mounts=(mount,)), rule)) == ["/mnt/x"]
    else:
        with pytest.raises(MountDenied, match="is outside what the site lets you mount") as caught:
            admit(VmRequest(image="a", mounts=(mount,)), rule)
        assert "/home/ann" in caught.value.hint


def test_an_empty_list_allows_no_mount_and_no_list_any() -> None:
    wish = "image=a,mount=/x:/y"
    assert targets(admit(wish, Rule())) == ["/y"]
    with pytest.raises(MountDenied, match="outside"):
        admit(wish, Rule(allow_mounts=()))


def test_site_mounts_are_added_with_the_users_own_paths() -> None:
    odd = replace(JOB, user="a:b")
    found = admit("image=a", Rule(mounts=("~", "/cvmfs:/cvmfs:ro", "/s/{user}:/scratch"), allow_mounts=()), job=odd)
    assert found.mounts == (
        Mount("/cvmfs", "/cvmfs", True),
        Mount("/home/ann", "/home/ann"),
        Mount("/s/a:b", "/scratch"),
    )


@pytest.mark.parametrize(
    "target",
    ["/", "/usr", "/usr/lib", "/etc/x", "/proc", "/proc/1", "/sys", "/dev", "/run/x", "/boot", "/lib", "/lib64/x"]
    + ["/bin", "/sbin", "/var", "/var/lib", "/var/run/x", "/dev/shm"],
)
def test_the_guests_own_folders_are_never_hidden(target: str) -> None:
    with pytest.raises(MountDenied, match="belongs to the guest's own system"):
        admit(VmRequest(image="a", mounts=(Mount("/data", target),)))


@pytest.mark.parametrize(
    "target", ["/usr/local", "/usr/local/x", "/var/tmp", "/var/lib/x", "/library", "/dev/shm/x", "/opt"]
)
def test_folders_that_are_free(target: str) -> None:
    assert targets(admit(VmRequest(image="a", mounts=(Mount("/data", target),)))) == [target]


def test_two_mounts_on_one_target() -> None:
    with pytest.raises(MountDenied, match="target '/y' is already that of mount '/x:/y'"):
        admit("image=a,mount=/x:/y,mount=/z:/y")
    with pytest.raises(MountDenied, match="already"):
        admit("image=a,mount=/x:/y", Rule(mounts=("/x:/y:ro",)))
    assert len(admit("image=a,mount=/x:/y", Rule(mounts=("/x:/y",))).mounts) == 1


def test_more_mounts_than_ports() -> None:
    mounts = tuple(Mount("/x", f"/m/{number}") for number in range(policy.MAX_MOUNTS + 1))
    with pytest.raises(LimitExceeded, match="more than 24 mounts"):
        admit(VmRequest(image="a", mounts=mounts))


@pytest.mark.parametrize(
    "work_dir, mounts, expected",
    [
        ("/home/ann/w", (), "/home/ann/w"),
        ("/data", (), "/data"),
        ("/tmp", (), "/tmp"),
        ("/home//ann/./w/", (), "/home/ann/w"),
        ("", (), None),
        ("relative", (), None),
        ("/a/../b", (), None),
        ("/", (), None),
        ("/etc", (), None),
        ("/usr/share/x", (), None),
        ("/var", (), None),
        ("/home/ann/w", (Mount("/home/ann", "/home/ann"),), None),
        ("/home/ann/w", (Mount("/", "/host"),), "/home/ann/w"),
        ("/home/ann/w", (Mount("/home/an", "/home/an"),), "/home/ann/w"),
        ("/home/ann/w", (Mount("/other", "/home/ann"),), "/home/ann/w"),
        ("/home/ann/w", (Mount("/other", "/home/ann/w"),), None),
        ("/home/ann/w", (Mount("/home/ann", "/home/ann"), Mount("/x", "/home/ann/w")), None),
    ],
)
def test_the_jobs_folder(work_dir: str, mounts: tuple[Mount, ...], expected: str | None) -> None:
    found = policy.work_dir_mount(replace(JOB, work_dir=work_dir), mounts)
    assert found == (Mount(expected, expected) if expected else None)


def test_the_jobs_folder_is_mounted_whatever_the_rules_allow() -> None:
    found = admit("image=a,mount=/h:/home:ro", Rule(allow_mounts=("/h",)), job=replace(JOB, work_dir="/home/ann/w"))
    assert found.mounts == (Mount("/h", "/home", True), Mount("/home/ann/w", "/home/ann/w"))


paths = st.lists(st.sampled_from(["a", "b", "ab", "a-b", "a.b", "é x"]), min_size=1, max_size=4).map(
    lambda p: "/" + "/".join(p)
)


@given(st.lists(paths, unique=True, max_size=12))
def test_parents_are_mounted_first(some: list[str]) -> None:
    order = [mount.target for mount in policy.arranged(Mount("/x", path) for path in some)]
    assert sorted(order) == sorted(some)
    for early, path in enumerate(order):
        assert not any(policy.inside(path, later) for later in order[early + 1 :])


@given(paths, paths)
def test_inside_goes_by_components(path: str, folder: str) -> None:
    assert policy.inside(path, folder) == (path.split("/")[: len(folder.split("/"))] == folder.split("/"))


@given(st.lists(st.tuples(paths, paths), max_size=4), paths)
def test_the_jobs_folder_is_always_seen_at_its_path(pairs: list[tuple[str, str]], work_dir: str) -> None:
    mounts = tuple({target: Mount(source, target) for source, target in pairs}.values())
    found = admit(VmRequest(image="a", mounts=mounts), job=replace(JOB, work_dir=work_dir)).mounts
    nearest = max((m for m in found if policy.inside(work_dir, m.target)), key=lambda m: len(m.target))
    seen = nearest.source + work_dir[len(nearest.target) :]
    assert seen == work_dir or nearest in mounts and nearest.target == work_dir


class Site:
    """A site's policy plug-in: answers what it was made with."""

    wnodes_api = 1

    def __init__(self, answer: VmRequest | None | WnodesError) -> None:
        self.answer = answer

    @hookimpl
    def wnodes_request_admit(self, request: VmRequest, job: Job) -> VmRequest | None:
        assert job == JOB and request.image == "a"
        if isinstance(self.answer, WnodesError):
            raise self.answer
        return self.answer


def hooks(*answers: VmRequest | None | WnodesError) -> Any:
    plugins = Plugins(builtins=(), scan=False)
    for number, answer in enumerate(answers):
        plugins.register(Site(answer), f"site{number}")
    assert [found.problem for found in plugins.found] == [""] * len(answers)
    return plugins.hook


def test_plugins_agree_change_or_refuse() -> None:
    assert admit("image=a", hook=hooks(None, None)).image == "a"
    changed = VmRequest(image="b", cpus=1, mounts=(Mount("/x", "/p/q"), Mount("/x", "/p")))
    found = admit("image=a", Rule(images=("a",)), hook=hooks(None, changed, changed))
    assert (found.image, targets(found)) == ("b", ["/p", "/p/q"])
    with pytest.raises(ImageDenied, match="not today"):
        admit("image=a", hook=hooks(ImageDenied("not today")))


def test_a_plugin_cannot_give_more_than_the_job_has() -> None:
    with pytest.raises(LimitExceeded, match="cpus 9 asked for, the job has 4"):
        admit("image=a", hook=hooks(VmRequest(image="a", cpus=9)))
    with pytest.raises(MountDenied, match="guest's own"):
        admit("image=a", hook=hooks(VmRequest(image="a", mounts=(Mount("/x", "/etc"),))))


def test_plugins_that_contradict_each_other() -> None:
    with pytest.raises(BrokenPlugin, match="in different ways"):
        admit("image=a", hook=hooks(VmRequest(image="b"), VmRequest(image="c")))
