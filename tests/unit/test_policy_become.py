"""Who may act as whom in a job's VM: the rules' word, and nothing that a job says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wnodes_core import policy, policy_become, settings
from wnodes_core.errors import LimitExceeded, RequestError, SettingsError
from wnodes_core.model import Job, Mount, VmRequest
from wnodes_core.policy_become import Databases, sanctioned
from wnodes_core.settings.schema import Rule, Settings

PILOT = Job("slurm", "7", "n0", 1001, 1001, "pilot", queue="grid")
UIDS = {"alice": 2001, "bob": 2002, "pilot": 1001, "root": 0, "daemon": 1, "svc": 999, "edge": 1000, "grp0": 3000}
SYSTEM = Databases(
    entry=lambda name: SimpleNamespace(
        pw_name=name, pw_uid=UIDS[name], pw_gid=0 if name == "grp0" else UIDS[name], pw_dir=f"/home/{name}", pw_shell="/bin/sh"
    ),
    groups=lambda name, gid: {name: gid, **({"payload": 900} if name == "bob" else {})},
    least_uid=lambda: 0,
)
RULES = (
    Rule(users=("pilot",), queues=("grid",), may_become=("alice", "@payload", "root", "svc", "edge", "grp0", "pilot")),
    Rule(users=("alice",), mounts=("~", "/data/{user}:/data:ro")),
    Rule(queues=("grid",), mounts=("/cvmfs:/cvmfs:ro",)),
    Rule(users=("pilot",), mounts=("/pilots",)),
)


def ask(name: object, job: Job = PILOT, rules: tuple[Rule, ...] = RULES, hook: Any = None, system: Databases = SYSTEM) -> Any:
    return sanctioned(job, name, Settings(policy=rules), hook, system)


def test_an_account_comes_with_its_own_ids_and_the_mounts_of_its_own_rules() -> None:
    found = ask("alice")
    assert (found.uid, found.gid, found.home, found.groups) == (2001, 2001, "/home/alice", {"alice": 2001})
    assert found.mounts == (Mount("/cvmfs", "/cvmfs", True), Mount("/data/alice", "/data", True), Mount("/home/alice", "/home/alice"))
    assert policy_become.Account.from_dict(found.to_dict()) == found
    assert ask("bob").mounts == (Mount("/cvmfs", "/cvmfs", True),), "by its group"


@pytest.mark.parametrize("job", [replace(PILOT, user="other"), replace(PILOT, queue="short"), replace(PILOT, user="alice", uid=2001)])
def test_a_job_that_no_rule_matches_is_told_which_is_wanting(job: Job) -> None:
    with pytest.raises(RequestError, match="account 'bob': no rule .* job 7") as told:
        ask("bob", job)
    assert told.value.hint.endswith("needs may_become: [bob]")


@pytest.mark.parametrize("name", ["root", "svc", "grp0", "nobody-here"])
def test_a_system_s_account_is_none_even_if_a_rule_names_it(name: str) -> None:
    with pytest.raises(RequestError, match=f"account '{name}'"):
        ask(name)


def test_the_node_s_own_least_uid_counts_if_it_is_higher() -> None:
    assert ask("edge").uid == 1000
    with pytest.raises(RequestError, match="want a uid of 1500 or more"):
        ask("edge", system=replace(SYSTEM, least_uid=lambda: 1500))


def test_a_database_that_answers_with_another_is_not_believed() -> None:
    other = replace(SYSTEM, entry=lambda name: SYSTEM.entry("bob"))
    with pytest.raises(RequestError, match="system account"):
        ask("alice", system=other)


@pytest.mark.parametrize("name", ["", "0", "2001", "../alice", "alice\n", "alice bob", "@payload", "*", "a" * 65, None, 7, ["alice"], "älice"])
def test_what_is_no_name_is_refused_before_any_database_is_asked(name: object) -> None:
    asked: list[str] = []
    with pytest.raises(RequestError, match="want the name of an account"):
        ask(name, system=replace(SYSTEM, entry=asked.append))
    assert not asked


def test_the_job_s_own_account_and_one_with_too_many_mounts_are_refused() -> None:
    with pytest.raises(RequestError, match="the job's own"):
        ask("pilot")
    with pytest.raises(LimitExceeded, match="3 mounts, its job's rule allows 2"):
        ask("alice", rules=(replace(RULES[0], become_ports=2), *RULES[1:]))


def test_a_plug_in_s_word_counts_for_the_account() -> None:
    seen: list[Job] = []

    def admit(request: VmRequest, job: Job) -> list[VmRequest]:
        seen.append(job)
        return [replace(request, mounts=(*request.mounts, Mount("/vo", "/vo")))]

    found = ask("alice", hook=SimpleNamespace(wnodes_request_admit=admit))
    assert Mount("/vo", "/vo") in found.mounts and [(job.user, job.uid, job.queue) for job in seen] == [("alice", 2001, "grid")]


def test_an_admitted_job_has_room_for_the_mounts_of_others_only_if_it_may_become_one() -> None:
    rules = (Rule(default_image="i"), Rule(users=("pilot",), may_become=("alice",), become_ports=2))
    person = lambda job: policy.Person("/home", ())  # noqa: E731
    spare = [
        policy.admit(VmRequest(), replace(PILOT, user=user), Settings(policy=rules), person_of=person).spare_mounts
        for user in ("pilot", "other")
    ]
    assert spare == [2, 0]
    many = tuple(Mount(f"/m{n}", f"/m{n}") for n in range(23))
    assert policy.admit(VmRequest(mounts=many), PILOT, Settings(policy=rules), person_of=person).spare_mounts == 1


def test_least_uid_is_read_from_login_defs(tmp_path: Any) -> None:
    path = tmp_path / "login.defs"
    path.write_text("# UID_MIN 5\nUID_MIN   1500 # x\nSYS_UID_MIN 100\n")
    assert policy_become.least_uid(str(path)) == 1500
    assert policy_become.least_uid(str(tmp_path / "none")) == 0


def test_the_sample_of_the_documentation_does_what_the_page_says(tmp_path: Any) -> None:
    text = (Path(__file__).parents[2] / "docs/grid.md").read_text()
    (sample,) = re.findall(r"(?ms)^```yaml settings\n(.*?)^```$", text)
    (tmp_path / "wnodes.yaml").write_text(sample)
    rules = settings.load(tmp_path / "wnodes.yaml").policy
    assert ask("alice", rules=rules).mounts == ()
    assert ask("bob", rules=rules).mounts == (Mount("/cvmfs", "/cvmfs", True), Mount("/scratch/bob", "/home/bob"))
    with pytest.raises(RequestError):
        ask("edge", rules=rules)


@pytest.mark.parametrize("word", ["'*'", "alice*", "'1001'", "../x", "'@'", "'alice bob'"])
def test_a_rule_names_accounts_and_no_patterns(tmp_path: Any, word: str) -> None:
    path = tmp_path / "wnodes.yaml"
    path.write_text(f"policy:\n  - may_become: [alice, {word}]\n")
    with pytest.raises(SettingsError, match=r"wnodes.yaml:2:\d+: policy\[0\].may_become\[1\]: .*want the name of an account, or @GROUP"):
        settings.load(path)
