"""The door to programs: argv only, deadlines, clean environment."""

import sys

import pytest

from wnodes_core.command import clean_environment, run, spawn
from wnodes_core.errors import CommandError

PY = [sys.executable, "-I", "-c"]


def test_run_returns_code_and_both_streams():
    result = run([*PY, "import sys; print(sys.stdin.read()); print('e', file=sys.stderr); sys.exit(3)"], stdin=b"in", check=False)
    assert (result.exit_code, result.text.strip(), result.stderr.strip()) == (3, "in", b"e")


def test_a_failure_quotes_the_end_of_stderr():
    with pytest.raises(CommandError, match="exit code 4: broken"):
        run([*PY, "import sys; print('broken', file=sys.stderr); sys.exit(4)"])


def test_a_program_past_its_deadline_is_killed():
    with pytest.raises(CommandError, match=r"no answer within 0\.2 s"):
        run([*PY, "import time; time.sleep(60)"], timeout_s=0.2)


def test_a_missing_program_is_a_command_error():
    with pytest.raises(CommandError, match="No such file"):
        run(["/nonexistent/x"])
    with pytest.raises(CommandError, match="No such file"):
        spawn(["/nonexistent/x"])


def test_words_are_never_a_shell_s():
    assert run(["printf", "%s", "$(id); `id` > x"]).text == "$(id); `id` > x"


def test_the_environment_is_ours_not_the_caller_s(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/evil.so")
    monkeypatch.setenv("SLURM_CONF", "/c")
    assert clean_environment(keep=["SLURM_CONF", "NOT_SET"]) == {
        "PATH": clean_environment()["PATH"], "LC_ALL": "C.UTF-8", "SLURM_CONF": "/c",
    }  # fmt: skip
    assert "LD_PRELOAD" not in run(["env"]).text
