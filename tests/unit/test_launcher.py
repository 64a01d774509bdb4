"""The launcher: what it asks for, how it starts a keeper, and that it refuses on any doubt."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import launcher
from wnodes_core.cli import parsers, run
from wnodes_core.guest.client import Exit
from wnodes_core.trace import Trace

# A keeper that writes down what it was born with, and waits for its end.
KEEPER = """
import json, os, sys
facts = {"given": json.load(sys.stdin), "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0)}
facts["fds"] = {name: os.readlink("/proc/self/fd/" + name) for name in os.listdir("/proc/self/fd") if name in "012"}
facts["more"] = [n for n in os.listdir("/proc/self/fd") if int(n) > 2 and os.path.exists("/proc/self/fd/" + n)]
facts["environ"] = dict(os.environ)
with open(sys.argv[1] + ".new", "w") as file:
    json.dump(facts, file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
import time
time.sleep(60)
"""

# A launcher with a descriptor of its LRMS's and a variable of the user's.
LAUNCHER = """
import json, os, sys, time
from wnodes_core import launcher
from wnodes_core.cli import parsers, run
real = os.execve
keeper, born = sys.argv[2], sys.argv[3]
def execve(program, argv, environ):
    assert argv[1:] == ["-I", "-m", "wnodes_core.keeper"], argv
    real(program, [program, "-I", "-c", keeper, born], environ)
os.execve = execve
os.environ["LD_PRELOAD_OF_THE_USER"] = "evil.so"
held = os.open("/etc/passwd", os.O_RDONLY)
os.set_inheritable(held, True)
pid = launcher.start_keeper({"plan": {"a": "b" * 200000}}, leave_family=sys.argv[1] == "leave")
before = launcher.keeper_gone(pid) if pid else None
while not os.path.exists(born):
    time.sleep(0.01)
facts = {"me": os.getpid(), "mine": os.getsid(0), "returned": pid, "gone": before}
facts["keeper"] = json.load(open(born))
os.kill(facts["keeper"]["pid"], 9)
if pid:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    facts["gone_after"] = [launcher.keeper_gone(pid), launcher.keeper_gone(pid)]
    os.waitpid(pid, 0)
    facts["gone_after"].append(launcher.keeper_gone(pid))
print(json.dumps(facts))
"""


def start(how: str, born: Path) -> dict[str, Any]:
    argv = [sys.executable, "-I", "-c", LAUNCHER, how, KEEPER, str(born)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_an_embedded_keeper_is_our_child_in_a_session_of_its_own(tmp_path: Path) -> None:
    facts = start("stay", tmp_path / "born")
    keeper = facts["keeper"]
    assert keeper["pid"] == facts["returned"]
    assert keeper["parent"] == facts["me"]
    assert keeper["session"] == keeper["pid"] != facts["mine"]
    assert facts["gone"] is False
    assert facts["gone_after"] == [True, True, True]


def test_a_keeper_that_outlives_the_step_leaves_the_family(tmp_path: Path) -> None:
    facts = start("leave", tmp_path / "born")
    keeper = facts["keeper"]
    assert facts["returned"] == 0
    assert keeper["parent"] != facts["me"]
    assert keeper["session"] not in (facts["mine"], keeper["pid"])


@pytest.mark.parametrize("how", ["stay", "leave"])
def test_a_keeper_gets_its_plan_and_nothing_else_of_the_task(tmp_path: Path, how: str) -> None:
    keeper = start(how, tmp_path / "born")["keeper"]
    assert keeper["given"] == {"plan": {"a": "b" * 200000}}
    assert keeper["fds"]["0"].startswith("pipe:")
    assert (keeper["fds"]["1"], keeper["fds"]["2"]) == ("/dev/null", "/dev/null")
    assert keeper["more"] == []
    assert set(keeper["environ"]) <= {"PATH", "LC_ALL", "LC_CTYPE"}


def test_a_command_is_what_this_process_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    command = launcher.command_of(("a", "b c"), {"X": "1"}, leader_only=frozenset({12}), on_tstp="pause")
    assert (command.argv, command.environ) == (["a", "b c"], {"X": "1"})
    assert (command.cwd, command.umask) == (str(tmp_path), 0o022)
    assert (command.uid, command.gid, command.groups) == (os.getuid(), os.getgid(), os.getgroups())
    assert (command.tty, command.leader_only, command.on_tstp) == (False, frozenset({12}), "pause")


@pytest.mark.parametrize(("terminals", "tty"), [((0, 1), True), ((0,), False), ((1,), False), ((2,), False)])
def test_a_terminal_is_wanted_where_stdin_and_stdout_are_one(
    monkeypatch: pytest.MonkeyPatch, terminals: tuple[int, ...], tty: bool
) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: fd in terminals)
    assert launcher.command_of(("a",), {}).tty is tty
    assert launcher.command_of(("a",), {}, tty=False).tty is False


def test_a_carried_file_goes_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "slurm_script").write_bytes(b"#!/bin/sh\nexit 3\n\xff")
    (file,) = launcher.command_of(("a",), {}, carried=(str(tmp_path / "slurm_script"),)).files
    assert base64.b64decode(file["content"]) == b"#!/bin/sh\nexit 3\n\xff"
    assert (file["path"], file["mode"], file["uid"]) == (str(tmp_path / "slurm_script"), 0o700, os.getuid())


def test_a_folder_that_was_removed_becomes_the_root(tmp_path: Path) -> None:
    ask = "from wnodes_core import launcher; print(launcher.command_of(('a',), {}).cwd)"
    script = f"import os; os.rmdir(os.getcwd()); {ask}"
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert done.stdout == "/\n", done.stderr


# A task in front of which the launcher stands, of a toy LRMS.
TASK = '''
from types import SimpleNamespace
def read_task(argv, environ):
    return SimpleNamespace(argv=("echo", "ON THE HOST"), environ=environ, carried=(), host_commands=(),
                           leader_signals=frozenset())
'''


def test_on_any_doubt_it_refuses_with_125_and_the_task_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "wnodes_toy").mkdir()
    (tmp_path / "wnodes_toy/__init__.py").touch()
    (tmp_path / "wnodes_toy/task.py").write_text(TASK)
    main = "from wnodes_core import launcher; launcher.main('toy', '/nonexistent')"
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {main}"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("wnodes: error: wnodesd at /nonexistent/wnodesd.sock")
    assert "hint: systemctl start wnodesd" in done.stderr
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (Exit(code=42), 42, ""),
        (Exit(code=127, error="x: No such file"), 127, "wnodes: x: x: No such file\n"),
        (Exit(signal=15), -15, ""),
    ],
    ids=["code", "not-started", "signal"],
)
def test_it_ends_as_the_command_ended(end: Exit, code: int, said: str) -> None:
    script = (
        "from wnodes_core import launcher; from wnodes_core.guest.client import Command, Exit;"
        f"launcher.finish(Command(['x'], '/', {{}}), {end!r})"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (code, said)


def test_the_site_s_list_of_host_commands_replaces_the_adapter_s(mocker):
    grant = {"role": "join", "folder": "/l", "home": "step"}
    call = mocker.patch.object(launcher, "call", return_value=grant)
    assert launcher._lease("slurm", "/s", ("srun", "sbatch")) == ("/l", ("srun", "sbatch"))
    call.return_value = {**grant, "host_commands": ["srun"]}
    assert launcher._lease("slurm", "/s", ("srun", "sbatch")) == ("/l", ("srun",))


def test_launch_was_called_when_our_process_was_made() -> None:
    before = time.monotonic()
    ask = "import time; from wnodes_core import launcher; print(launcher.process_began(), time.monotonic())"
    time.sleep(0.05)
    called = time.monotonic()
    done = subprocess.run([sys.executable, "-I", "-c", ask], capture_output=True, text=True, timeout=20)
    began, asked = map(float, done.stdout.split())
    # The kernel counts in ticks of 10 ms, of which we take the middle.
    assert before < called - 0.006 <= began < asked <= time.monotonic()


def test_the_keeper_is_told_what_came_before_it(mocker: Any) -> None:
    grant = {"role": "start", "folder": "/l", "home": "job", "plan": {}, "token": "t"}
    mocker.patch.object(launcher, "call", side_effect=lambda *a, **k: time.sleep(0.05) or grant)
    start_keeper = mocker.patch.object(launcher, "start_keeper")
    mocker.patch.object(launcher, "process_began", return_value=time.monotonic() - 1)
    launcher._lease("slurm", "/s", ())
    trace = Trace.from_dict(json.loads(json.dumps(start_keeper.call_args.args[0]["trace"])))
    first, second = trace.steps
    assert (first.name, first.begin) == ("launcher", 0) and first.seconds == pytest.approx(1, abs=0.05)
    assert second.name == "lease" and second.begin == first.end and second.seconds >= 0.05
    assert trace.origin == pytest.approx(time.monotonic() - second.end, abs=0.1)


@pytest.mark.parametrize("kind", ["auto", "warm", "cold"])
def test_run_asks_for_a_kind_of_start(kind: str) -> None:
    args = parsers.build(["run"]).parse_args(["run", "--vm", "image=a,start=warm", "--start", kind, "--", "true"])
    assert run.request_of(args).start == kind
    args = parsers.build(["run"]).parse_args(["run", "--vm", "image=a,start=warm", "--", "true"])
    assert run.request_of(args).start == "warm"


def test_run_refuses_another_kind_of_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsers.build(["run"]).parse_args(["run", "--start", "hot", "--", "true"])
    assert "invalid choice: 'hot'" in capsys.readouterr().err
