"""The real hook scripts, started as the LRMS starts them, in the environment of its worst user."""

from __future__ import annotations

from wnodes_core.testing.calls import REFUSALS, Answer, Call, Outcome
from wnodes_core.testing.stage import Run, Stage

# What a hook that carries one message may not pay for: each costs more than the interpreter itself.
HEAVY = {"libvirt", "lxml", "yaml", "asyncio", "prometheus_client", "importlib.metadata", "multiprocessing"}


class LrmsScripts:
    """Part of LrmsContract."""

    calls: tuple[Call, ...]

    def test_an_ordinary_job_passes_untouched_and_starts_no_python(self, stage: Stage, ordinary_call: Call) -> None:
        if not ordinary_call.script:
            return
        for outcome in (Outcome.GRANTED, Outcome.DRAIN, Outcome.AWAY, Outcome.BUG):
            done = stage.run(ordinary_call, outcome)
            assert done.pythons == [], "an ordinary job's hook must not start Python"
            assert (done.asked, done.commands, done.trapped) == ([], [], "")
            wanted = ordinary_call.answers.get(Outcome.GRANTED, Answer())
            assert done.exit_code == wanted.exit_code, done.stderr
            assert all(word in done.stdout for word in wanted.stdout), done.stdout
            assert wanted.stdout or not done.stdout, done.stdout
            assert not [line for line in done.stderr.splitlines() if "LD_PRELOAD" not in line], done.stderr

    def test_every_outcome_has_its_native_answer(self, stage: Stage, case: tuple[Call, Outcome]) -> None:
        call, outcome = case
        done = stage.run(call, outcome)
        _check(done, call.answers[outcome])
        if outcome in REFUSALS and done.asked and not call.answers[outcome].silent:
            assert REFUSALS[outcome].message in done.told, f"nobody is told why: {done}"

    def test_a_hook_run_twice_answers_the_same(self, stage: Stage, case: tuple[Call, Outcome]) -> None:
        call, outcome = case
        first = stage.run(call, outcome)
        again = stage.run(call, outcome, folder=first.folder)
        _check(again, call.answers[outcome])
        assert (again.commands, again.asked) == (first.commands, first.asked)

    def test_nothing_of_the_users_environment_is_run(self, stage: Stage, scripted_call: Call) -> None:
        for outcome in scripted_call.outcomes:
            done = stage.run(scripted_call, outcome)
            assert done.trapped == "", f"it imported or sourced the user's: {done.trapped}"
            assert all("-I" in argv[:1] for argv in done.pythons), f"Python without -I: {done.pythons}"
            poisoned = [word for argv in done.commands for word in argv if word.startswith("POISONED")]
            assert not poisoned, f"a command of the host gets the user's {poisoned}"

    def test_a_vm_jobs_hook_starts_python_once_and_loads_little(self, stage: Stage, scripted_call: Call) -> None:
        done = stage.run(scripted_call, scripted_call.outcomes[0])
        assert len(done.pythons) <= 1, done.pythons
        assert not done.modules & HEAVY, f"too dear for a hook: {sorted(done.modules & HEAVY)}"

    def test_the_scripts_name_no_python_but_ours(self, stage: Stage) -> None:
        for path in stage.hooks.iterdir():
            text = path.read_text().replace(str(stage.python), "")
            code = [line.partition("# ")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
            assert not [line for line in code if "/python" in line], f"{path.name}: want @PYTHON@"
            assert "@PYTHON@" not in text and "@RUN@" not in text


def _check(done: Run, wanted: Answer) -> None:
    assert done.exit_code == wanted.exit_code, f"exit code {done.exit_code}, want {wanted.exit_code}: {done.stderr}"
    assert len(done.commands) == len(wanted.commands), done.commands
    for argv, beginning in zip(done.commands, wanted.commands, strict=True):
        assert tuple(argv[: len(beginning)]) == beginning, argv
    for word in wanted.stdout:
        assert word in done.stdout, done.stdout
    for name, word in wanted.files.items():
        assert word in (done.folder / name).read_text(), name
