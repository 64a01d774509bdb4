"""The policy's word on a second account in a job's VM: whether, as whom, with which mounts.

A job names an account and nothing else. Who asks is the lease's own record; ids, groups and home are those of the
system's databases; mounts are what the site's rules (and plug-ins) give *that account*, in the job's own queue and
project, and never what the guest says.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from wnodes_core import policy
from wnodes_core.errors import LimitExceeded, RequestError
from wnodes_core.model import Job, Mount, VmRequest
from wnodes_core.plan import group_name
from wnodes_core.settings.values import expand_mount

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
LOGIN_DEFS = "/etc/login.defs"
LEAST_UID = 1000  # login.defs(5): where UID_MIN begins if the site says nothing


@dataclass(frozen=True)
class Account:
    """A second account as this node knows it; ``groups`` maps names to gids, ``mounts`` are its own."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str
    groups: Mapping[str, int]
    mounts: tuple[Mount, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """Back from ``to_dict``."""
        return cls(**{**data, "mounts": tuple(Mount(**mount) for mount in data["mounts"])})


@dataclass(frozen=True)
class Databases:
    """What is asked of the system; tests give their own."""

    entry: Callable[[str], Any] = pwd.getpwnam
    groups: Callable[[str, int], Mapping[str, int]] = field(default=lambda name, gid: _groups(name, gid))
    least_uid: Callable[[], int] = field(default=lambda: least_uid())


def sanctioned(job: Job, name: object, settings: Any, hook: Any = None, system: Databases | None = None) -> Account:
    """The account that ``job`` may become by that name, with its mounts. Blocks for the user database.

    Raises RequestError (MountDenied, LimitExceeded) that names the account and the rule that is wanting.
    """
    system = system or Databases()
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(f"account {str(name)[:70]!r}: want the name of an account")
    rule = policy.rule_for(job, settings.policy, lambda: policy.look_up(job))
    refusal = RequestError(
        f"account {name!r}: no rule of this site lets job {job.job_id} of {job.user!r} become it",
        hint=f"a rule of the policy that matches the job needs may_become: [{name}]",
    )
    if not rule.may_become:
        raise refusal
    account = _found(name, system)
    named = {f"@{group}" for group in account.groups} | {name}
    if not named & set(rule.may_become):
        raise refusal
    if account.uid == job.uid:
        raise RequestError(f"account {name!r} is the job's own already")
    return replace(account, mounts=_mounts(account, job, settings, hook, policy.become_ports(rule)))


def _found(name: str, system: Databases) -> Account:
    try:
        entry = system.entry(name)
    except KeyError:
        raise RequestError(f"account {name!r}: there is none of that name on this node") from None
    least = max(LEAST_UID, system.least_uid())
    if entry.pw_name != name or entry.pw_uid < least or entry.pw_gid == 0:
        raise RequestError(f"account {name!r}: a system account, which no job becomes: want a uid of {least} or more")
    groups = system.groups(name, entry.pw_gid)
    return Account(name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell, groups)


def _groups(name: str, gid: int) -> dict[str, int]:
    return {group_name(each): each for each in dict.fromkeys([gid, *os.getgrouplist(name, gid)])}


def least_uid(path: str = LOGIN_DEFS) -> int:
    """UID_MIN of login.defs(5), 0 where it says nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        return 0
    values = [each[1] for each in words if len(each) > 1 and each[0] == "UID_MIN" and each[1].isdigit()]
    return int(values[-1]) if values else 0


def _mounts(account: Account, job: Job, settings: Any, hook: Any, most: int) -> tuple[Mount, ...]:
    """What the site's rules mount for the account itself; served with its rights, each by a process of its own."""
    theirs = replace(job, user=account.name, uid=account.uid, gid=account.gid, work_dir="")
    person = policy.Person(account.home, tuple(account.groups))
    rule = policy.rule_for(theirs, settings.policy, lambda: person)
    site = tuple(Mount.parse(expand_mount(text, account.home, account.name)) for text in rule.mounts)
    request = policy.asked_plugins(VmRequest(mounts=policy.arranged(site)), theirs, hook)
    if len(request.mounts) > most:
        raise LimitExceeded(
            f"account {account.name!r} has {len(request.mounts)} mounts, its job's rule allows {most}",
            hint=f"become_ports: {len(request.mounts)}",
        )
    return request.mounts
