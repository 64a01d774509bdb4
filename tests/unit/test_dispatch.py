"""One hook call of an LRMS: an ordinary job is left alone, every failure becomes the LRMS's own answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.dispatch import dispatch

# An adapter of a toy LRMS: the option is argv[1], the reply says the verdict.
ADAPTER = '''
from wnodes_core.api import Job, NativeReply, VmRequest, hookimpl

wnodes_api = 1


@hookimpl
def wnodes_lrms_read(call):
    if len(call.argv) < 2:
        return None
    if call.argv[1] == "bug":
        raise KeyError("our bug")
    return VmRequest.parse(call.argv[1]), Job("toy", "7", "n0", 1000, 1000, "ann")


@hookimpl
def wnodes_lrms_reply(call, error, job):
    if error is None:
        return NativeReply(0, stdout="fine", commands=(("false",), ("touch", call.environ["TOLD"]), ("/no/such",)))
    return NativeReply({"hold": 10, "requeue": 11, "drain": 12}[error.verdict], stderr=f"toy: {error.message}")
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy adapter, importable."""
    (tmp_path / "wnodes_toy").mkdir()
    (tmp_path / "wnodes_toy/__init__.py").touch()
    (tmp_path / "wnodes_toy/plugin.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("wnodes_toy", "wnodes_toy.plugin"):
        sys.modules.pop(name, None)


class Daemon:
    """Answers one question with a prepared line."""

    def __init__(self, path: Path, answer: dict[str, Any]) -> None:
        self.path, self.asked, self.answer = str(path), {}, answer
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self.listener, self.listener.accept()[0] as link, link.makefile("rw") as file:
            self.asked = json.loads(file.readline())
            file.write(json.dumps(self.answer) + "\n")

    def join(self) -> dict[str, Any]:
        self.thread.join(5)
        return self.asked


def call(phase: str, *argv: str, socket_path: str = "/nonexistent/sock", **environ: str) -> int:
    return dispatch("toy", phase, ("hook", *argv), environ, socket_path)


def test_an_ordinary_job_is_left_alone(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prepare") == 0
    assert capsys.readouterr() == ("", "")


def test_a_bad_request_is_answered_in_the_adapters_words(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("submit", "image=a,memroy=1G") == 10
    assert "did you mean memory=?" in capsys.readouterr().err


def test_a_good_request_at_submit_asks_no_daemon(toy: Path, tmp_path: Path) -> None:
    assert call("submit", "image=a", TOLD=str(tmp_path / "told")) == 0


def test_the_replys_commands_run_in_order_and_may_fail(toy: Path, tmp_path: Path) -> None:
    call("submit", "image=a", TOLD=str(tmp_path / "told"))
    assert (tmp_path / "told").exists()


def test_prepare_gives_the_daemon_request_and_job(toy: Path, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "sock", {"ok": True, "lease": "l"})
    assert call("prepare", "image=a,cpus=2", socket_path=daemon.path, TOLD=str(tmp_path / "told")) == 0
    asked = daemon.join()
    assert (asked["op"], asked["lrms"]) == ("prepare", "toy")
    assert (asked["request"]["image"], asked["request"]["cpus"], asked["job"]["job_id"]) == ("a", 2, "7")


def test_finish_names_the_job_and_its_node_only(toy: Path, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "sock", {"ok": True})
    call("finish", "image=a", socket_path=daemon.path, TOLD=str(tmp_path / "told"))
    assert daemon.join() == {"op": "finish", "lrms": "toy", "job_id": "7", "node": "n0"}


def test_the_daemons_refusal_keeps_its_verdict(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"kind": "NoKvm", "message": "no kvm here", "hint": ""}
    daemon = Daemon(tmp_path / "sock", {"ok": False, "error": error})
    assert call("prepare", "image=a", socket_path=daemon.path) == 12
    daemon.join()
    assert capsys.readouterr().err == "toy: no kvm here"


def test_a_daemon_that_is_down_is_tried_later_and_elsewhere(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prepare", "image=a") == 11
    assert "/nonexistent/sock" in capsys.readouterr().err


def hook(toy: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A hook script in its own process, with an environment of the user's making."""
    # the last line of every hook script, after a path that a test needs and an installation does not
    main = "from wnodes_core import hookmain; hookmain.main('toy', 'submit')"
    script = f"import sys; sys.path.insert(0, {str(toy)!r}); {main}"
    return subprocess.run(
        [sys.executable, "-I", "-c", script, *argv], env=environ, capture_output=True, text=True, timeout=30
    )


def test_a_hook_scripts_exit_code_is_the_adapters(toy: Path, tmp_path: Path) -> None:
    assert hook(toy).returncode == 0
    done = hook(toy, "image=a", TOLD=str(tmp_path / "told"), PATH="/nowhere")
    assert (done.returncode, done.stdout) == (0, "fine"), done.stderr
    assert os.stat(tmp_path / "told").st_mode & 0o777 == 0o600
    assert hook(toy, "image=..").returncode == 10


def test_a_bug_of_ours_is_70_without_a_traceback_for_the_user(toy: Path) -> None:
    done = hook(toy, "bug")
    assert (done.returncode, done.stdout, done.stderr) == (70, "", "")
