"""``wnodes lease`` and the other commands, against a socket that answers as wnodesd does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import cli, history
from wnodes_core.cli import console, leases
from wnodes_core.errors import RequestError
from wnodes_core.settings import DaemonSettings, Settings

TRACE = [["boot", 0.5, 4.0], ["image", 0.0, 0.5], ["first instruction", 4.5, 0.5], ["run", 5.0, 70.0]]
START = {"kind": "warm", "way": "mapped", "template": "deb\x1b[1m", "fallback": ""}


def a_lease(**changes: Any) -> dict[str, Any]:
    return {
        **{
            "id": "slurm-n0-12-ab12cd",
            "lrms": "slurm",
            "job_id": "12",
            "node": "n0",
            "user": "ann",
            "uid": os.getuid(),
        },
        **{"image": "debian12", "state": "running", "since": time.time() - 75, "folder": "/no/where", "trace": TRACE, "start": START},
        **changes,
    }


class Daemon:
    """Answers every request with ``replies[op]`` and keeps the requests."""

    def __init__(self, path: str) -> None:
        self.replies: dict[str, Any] = {"leases": {"ok": True, "leases": []}, "release": {"ok": True}}
        self.requests: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                request = json.loads(stream.readline())
                self.requests.append(request)
                stream.write(json.dumps(self.replies[request["op"]]).encode() + b"\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture(autouse=True)
def own_settings(mocker, tmp_path: Path) -> str:
    """Settings whose socket is the test's own, and no embedded leases of this machine."""
    path = str(tmp_path / "wnodesd.sock")
    mocker.patch("wnodes_core.settings.load", return_value=Settings(daemon=DaemonSettings(socket=path)))
    mocker.patch.object(leases, "embedded_states", return_value=[])
    mocker.patch.object(leases, "embedded_ended", return_value=[])
    return path


@pytest.fixture
def daemon(own_settings: str):
    daemon = Daemon(own_settings)
    daemon.replies["leases"]["leases"] = [a_lease(), a_lease(id="slurm-n0-13-ffffff", job_id="13", user="b\x1b[31m")]
    yield daemon
    daemon.close()


def test_list(daemon: Daemon, capsys) -> None:
    assert cli.main(["lease", "list"]) == 0
    assert capsys.readouterr().out == (
        "LEASE               JOB       USER       IMAGE     STATE      AGE\n"
        "slurm-n0-12-ab12cd  slurm:12  ann        debian12  running  1m15s\n"
        "slurm-n0-13-ffffff  slurm:13  b\\x1b[31m  debian12  running  1m15s\n"
    )


def test_list_json_has_the_same_keys_for_every_lease(daemon: Daemon, mocker, capsys) -> None:
    mocker.patch.object(leases, "embedded_states", return_value=[{"id": "local-1", "state": "running", "folder": "/x"}])
    assert cli.main(["lease", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [tuple(each) for each in found] == [leases.KEYS] * 3
    assert [each["origin"] for each in found] == ["embedded", "wnodesd", "wnodesd"]


def test_no_daemon_is_no_error(capsys) -> None:
    assert cli.main(["lease", "list", "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", "")


def test_a_daemon_that_does_not_answer_is_warned_of(own_settings: str, capsys) -> None:
    Path(own_settings).touch()
    assert cli.main(["lease", "list", "--json"]) == 0
    assert "wnodes: warning: wnodesd at" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["slurm-n0-12-ab12cd", "12", "slurm-n0-12"])
def test_show_by_id_job_or_beginning(daemon: Daemon, word: str, capsys) -> None:
    assert cli.main(["lease", "show", word]) == 0
    said = capsys.readouterr().out
    assert "id            slurm-n0-12-ab12cd\n" in said
    assert "state         running\n" in said and "trace         4 phases\n" in said
    assert "start         warm start in 5.000 s (mapped, template deb\\x1b[1m)\n" in said


@pytest.mark.parametrize("word, said", [
        ("99", "no such lease of yours; the last on this node: slurm-n0-12-ab12cd, slurm-n0-13-ffffff\n"),
        ("slurm-n0-1", "more than one answers"),
    ])
def test_a_lease_that_is_not_one(daemon: Daemon, word: str, said: str, capsys) -> None:
    assert cli.main(["lease", "show", word]) == 1
    assert said in capsys.readouterr().err


def test_trace(daemon: Daemon, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "63")
    assert cli.main(["lease", "trace", "12"]) == 0
    assert capsys.readouterr().out == (
        "warm start in 5.000 s (mapped, template deb\\x1b[1m)\n"
        "phase                 at  seconds\n"
        "image              0.000    0.500  |###                       |\n"
        "boot               0.500    4.000  |   ####################   |\n"
        "first instruction  4.500    0.500  |                       ###|\n"
        "run                5.000   70.000  |                         >|\n"
    )
    assert cli.main(["lease", "trace", "12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["id"], told["seconds"], told["start"]["kind"]) == ("slurm-n0-12-ab12cd", 5.0, "warm")
    assert told["trace"][1] == {"name": "boot", "begin": 0.5, "seconds": 4.0}


def test_trace_without_a_name_is_of_the_only_lease_or_the_last(daemon: Daemon, capsys) -> None:
    assert cli.main(["lease", "trace"]) == 1
    assert "which lease? more than one is here: slurm-n0-12-ab12cd, slurm-n0-13-ffffff" in capsys.readouterr().err
    ended = [a_lease(id=f"slurm-n0-{n}-e", state="ended", since=n, trace=[["boot", 0.0, n]]) for n in (1, 2)]
    daemon.replies["leases"]["leases"] = [*ended, a_lease()]
    assert cli.main(["lease", "trace"]) == 0
    assert "warm start in 5.000 s" in capsys.readouterr().out
    daemon.replies["leases"]["leases"] = ended
    assert cli.main(["lease", "trace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "slurm-n0-2-e"
    daemon.replies["leases"]["leases"] = [a_lease(trace=[], start=None)]
    assert cli.main(["lease", "trace"]) == 0
    assert capsys.readouterr().out == "lease slurm-n0-12-ab12cd: no phase has ended yet\n"
    daemon.replies["leases"]["leases"] = []
    assert cli.main(["lease", "trace"]) == 1
    assert "there is none on this node, and none has ended" in capsys.readouterr().err


def test_an_embedded_run_that_is_over_is_remembered(tmp_path: Path, mocker, capsys) -> None:
    mocker.patch.object(leases, "embedded_ended", return_value=[a_lease(id="local-1", state="ended", job_id="1")])
    assert cli.main(["lease", "list"]) == 0
    assert "local-1" not in capsys.readouterr().out
    assert cli.main(["lease", "trace", "local-1"]) == 0
    assert "boot" in capsys.readouterr().out
    assert cli.main(["lease", "release", "local-1", "-y"]) == 1
    assert "it has ended already" in capsys.readouterr().err
    mocker.patch.object(leases, "embedded_states", return_value=[a_lease(id="local-1", state="running", job_id="1")])
    assert cli.main(["lease", "show", "local-1"]) == 0  # it is just ending: known twice, one lease
    assert "state         running" in capsys.readouterr().out


def test_what_embedded_runs_left_is_read_from_the_callers_own_folder(tmp_path: Path, mocker) -> None:
    mocker.stopall()
    history.remember(tmp_path / history.OF_USER, {"id": "a", "trace": TRACE})
    with (tmp_path / history.OF_USER).open("a") as file:
        file.write('[]\n{"no": "id"}\nhalf')
    assert leases.embedded_ended(str(tmp_path)) == [{"id": "a", "trace": TRACE, "state": "ended"}]
    assert leases.embedded_ended(str(tmp_path / "none")) == []
    mocker.patch("os.getuid", return_value=os.getuid() + 1)
    assert leases.embedded_ended(str(tmp_path)) == []


def test_release_asks_first(daemon: Daemon, mocker, capsys) -> None:
    answer = mocker.patch("wnodes_core.cli.output.confirm", return_value=False)
    assert cli.main(["lease", "release", "12"]) == 1
    answer.return_value = None
    assert cli.main(["lease", "release", "12"]) == 1
    assert "say --yes" in capsys.readouterr().err
    assert all(request["op"] == "leases" for request in daemon.requests)
    answer.return_value = True
    assert cli.main(["lease", "release", "12"]) == 0
    assert daemon.requests[-1] == {"op": "release", "lease": "slurm-n0-12-ab12cd"}
    assert capsys.readouterr().out == "slurm-n0-12-ab12cd  released\n"


def test_release_without_asking(daemon: Daemon, capsys) -> None:
    daemon.replies["release"] = {"ok": True, "pending": True}
    assert cli.main(["lease", "release", "12", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "slurm-n0-12-ab12cd", "pending": True}
    daemon.replies["release"] = {"ok": False, "error": {"kind": "RequestError", "message": "no such lease of yours"}}
    assert cli.main(["lease", "release", "12", "--yes"]) == 1


def test_release_of_an_embedded_run_ends_its_keeper(tmp_path: Path, mocker, capsys) -> None:
    keeper = subprocess.Popen(["sleep", "60"])
    try:
        started = int(Path(f"/proc/{keeper.pid}/stat").read_text().rpartition(")")[2].split()[19])
        folder = tmp_path / "local-1"
        folder.mkdir()
        state = {"id": "local-1", "uid": os.getuid(), "folder": str(folder), "state": "running"}
        state["keeper"] = {"pid": keeper.pid, "started": started}
        mocker.patch.object(leases, "embedded_states", return_value=[state])
        assert cli.main(["lease", "release", "local-1", "-y"]) == 0
        assert keeper.wait(5) == -9
        assert not folder.exists()
    finally:
        keeper.kill()
        keeper.wait()


def test_embedded_leases_are_read_from_the_callers_own_folder(tmp_path: Path, mocker) -> None:
    mocker.stopall()
    for name, text in (("a", '{"id": "other", "state": "running"}'), ("b", "half"), ("c", "[]"), ("d", None)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "lease.json").write_text(text)
    expected = [{"id": "a", "state": "running", "folder": str(tmp_path / "a")}]
    assert leases.embedded_states(str(tmp_path)) == expected
    assert leases.embedded_states(str(tmp_path / "none")) == []
    mocker.patch("os.getuid", return_value=os.getuid() + 1)
    assert leases.embedded_states(str(tmp_path)) == []


def test_console_shows_control_characters(tmp_path: Path, capsys) -> None:
    (tmp_path / "console.log").write_bytes(
        b"\x1b[2J\x1b[01;31mred\x1b[0m\r\n\x1b]0;title\x07bell\x07 \xff\xc3\xa9\nlogin: "
    )
    assert console.show(str(tmp_path), os.getuid()) == 0
    assert capsys.readouterr().out == "red\nbell\\x07 \ufffdé\nlogin: "


@pytest.mark.parametrize("lines, shown", [(0, ""), (1, "three"), (2, "two\nthree"), (9, "one\ntwo\nthree")])
def test_console_of_the_last_lines(tmp_path: Path, lines: int, shown: str, capsys) -> None:
    (tmp_path / "console.log").write_text("one\ntwo\nthree")
    console.show(str(tmp_path), os.getuid(), lines=lines)
    assert capsys.readouterr().out == shown


def test_console_of_many_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "console.log").write_text("".join(f"{number:09}\n" for number in range(20_000)))
    console.show(str(tmp_path), os.getuid(), lines=9_000)
    said = capsys.readouterr().out.splitlines()
    assert (len(said), said[0], said[-1]) == (9_000, "000011000", "000019999")


def test_console_follows_no_link_and_reads_no_strangers_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no console yet"):
        console.show(str(tmp_path), 0)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tmp_path / "console.log").symlink_to(secret)
    with pytest.raises(RequestError, match="symbolic links"):
        console.show(str(tmp_path), os.getuid())
    (tmp_path / "console.log").unlink()
    os.mkfifo(tmp_path / "console.log")
    with pytest.raises(RequestError, match="want a file of uid"):
        console.show(str(tmp_path), os.getuid())


def test_console_follows_until_the_lease_is_gone(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"one\ntw")
    code = f"import os; from wnodes_core.cli import console; console.show({str(tmp_path)!r}, os.getuid(), follow=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == "one\n"
        with log.open("ab") as file:
            file.write(b"o\n")
        assert reader.stdout.readline() == "two\n"
        log.write_bytes(b"x\n")  # the keeper cuts it
        assert [reader.stdout.readline() for _ in range(3)] == [
            "\n",
            "[wnodes: the console was cut at its limit]\n",
            "x\n",
        ]
        log.unlink()
        assert reader.stdout.read() == ""
    assert reader.returncode == 0
