"""The launcher that the LRMS starts in front of a task: what it reads, and that it never runs a job bare."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from wnodes_core.api import errors
from wnodes_core.testing.calls import REFUSALS, Call, Outcome, TaskCall
from wnodes_core.testing.lrms_scripts import HEAVY
from wnodes_core.testing.stage import Stage
from wnodes_core.tools import run


class LrmsTask:
    """Part of LrmsContract."""

    lrms: str
    tasks: tuple[TaskCall, ...]
    refused_code: int

    def launch(self, line: str) -> Call:
        """Given by LrmsContract."""
        raise NotImplementedError

    @pytest.fixture
    def task(self) -> Any:
        """The adapter's module for its launcher."""
        return importlib.import_module(f"wnodes_{self.lrms}.task")

    def test_the_command_is_the_one_that_the_lrms_meant(self, task: Any) -> None:
        for each in self.tasks:
            given = dict(each.environ)
            found = task.read_task(each.argv, given)
            assert tuple(found.argv) == each.means
            assert given == dict(each.environ), "the environment is the caller's"
            _check_task(found)
            assert task.read_task(each.argv, given) == found, "reading may be repeated"

    def test_a_launch_carries_the_shell_line(self, task: Any) -> None:
        line = "echo \"a b\" 'c'; exit 7"
        call = self.launch(line)
        found = task.read_task((call.script, *call.argv), dict(call.environ))
        assert line in " ".join(found.argv), found.argv

    def test_a_launcher_called_by_hand_has_no_command(self, task: Any) -> None:
        with pytest.raises((errors.WnodesError, ValueError)):
            task.read_task(("launch",), {})

    def test_reading_a_task_loads_little(self) -> None:
        code = f"import wnodes_{self.lrms}.task, sys; print(*sys.modules)"
        loaded = set(run([sys.executable, "-I", "-c", code]).text.split())
        assert not loaded & HEAVY, f"every task of every VM job pays for {sorted(loaded & HEAVY)}"

    def test_a_job_that_asked_for_a_vm_never_runs_bare(self, stage: Stage, refusal: Outcome) -> None:
        """Whatever wnodesd says, and if it is away: the command has not run, the code is ours, the user knows why."""
        ran = stage.folder / "open" / "ran"
        ran.parent.mkdir()
        ran.parent.chmod(0o777)
        done = stage.run(self.launch(f"touch {shlex.quote(str(ran))}"), refusal)
        assert not ran.exists(), "it ran on the host"
        assert done.trapped == ""
        if refusal is Outcome.BUG:
            assert done.exit_code != 0
            return
        assert done.exit_code == self.refused_code, done.stderr
        assert refusal is Outcome.AWAY or REFUSALS[refusal].message in done.told, done.stderr


def _check_task(task: Any) -> None:
    assert all(isinstance(word, str) for word in task.argv)
    assert isinstance(task.environ, Mapping) and all(isinstance(text, str) for text in task.environ.values())
    assert all(isinstance(path, str) for path in task.carried)
    assert all(isinstance(name, str) and "/" not in name for name in task.host_commands), "names, not paths"
    assert all(isinstance(number, int) for number in task.leader_signals)
