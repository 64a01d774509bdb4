"""A job whose VM could not be had goes back to its queue once, and only if nothing of it ran."""

from types import SimpleNamespace

import pytest

from wnodes_core.agent import requeueing
from wnodes_core.errors import BootTimeout, CommandError, LibvirtDown, RequestError
from wnodes_core.model import Job, NativeReply

JOB = Job("slurm", "12", "n0", 1000, 1000, "u")


def lease(ran=False):
    return SimpleNamespace(ran=ran, job=JOB)


@pytest.mark.parametrize(
    ("error", "ran", "back"),
    [
        (BootTimeout("late"), False, True),
        (BootTimeout("late"), True, False),
        (RequestError("no"), False, False),
        (LibvirtDown("a keeper's word never drains"), False, False),
    ],
)
def test_only_a_transient_error_before_the_user_s_code_requeues(error, ran, back):
    assert requeueing.wanted(lease(ran), error) is back


class Hook:
    def __init__(self, *commands):
        self.commands, self.calls = commands, []

    def wnodes_lrms_reply(self, call, error, job):
        self.calls.append((call.phase.value, call.environ["SLURM_JOB_ID"], error.message))
        return NativeReply(1, commands=self.commands)


def test_the_adapter_s_own_commands_are_run(tmp_path):
    hook = Hook(("touch", f"{tmp_path}/a"), ("touch", f"{tmp_path}/b"))
    requeueing.requeue(lease(), BootTimeout("late"), hook, {"PATH": "/usr/bin:/bin"})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert hook.calls == [("launch", "12", "late")]


def test_one_command_that_fails_stops_no_other_and_is_told(tmp_path):
    hook = Hook(("false",), ("touch", f"{tmp_path}/b"))
    with pytest.raises(CommandError, match="false"):
        requeueing.requeue(lease(), BootTimeout("late"), hook, {"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "b").exists()
