"""The client's side of the socket: progress, refusals, a daemon that is down or silent."""

from __future__ import annotations

import socket
import threading

import pytest

from wnodes_core.agent.client import call
from wnodes_core.agent.metrics import loopback
from wnodes_core.errors import SettingsError, TransientError, UnknownImage


@pytest.fixture
def daemon(tmp_path):
    """Answers one client with the given bytes."""
    path = str(tmp_path / "sock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    threads = []

    def answer(data: bytes) -> str:
        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.makefile("rb").readline()
                client.sendall(data)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return path

    yield answer
    for thread in threads:
        thread.join()
    server.close()


def test_progress_comes_before_the_answer(daemon):
    told: list[str] = []
    path = daemon(b'{"progress": "1"}\n{"progress": "2"}\n{"ok": true, "role": "join"}\n')
    assert call({"op": "launch"}, on_progress=told.append, path=path) == {"ok": True, "role": "join"}
    assert told == ["1", "2"]


def test_a_refusal_is_raised_as_what_it_is(daemon):
    path = daemon(b'{"ok": false, "error": {"kind": "UnknownImage", "message": "no x", "hint": "h"}}\n')
    with pytest.raises(UnknownImage, match="no x"):
        call({}, path=path)


@pytest.mark.parametrize("data", [b"", b'{"ok": ', b"nonsense\n"])
def test_half_an_answer_is_no_answer(daemon, data):
    with pytest.raises(TransientError, match="does not answer"):
        call({}, path=daemon(data))


def test_a_daemon_that_is_down_gets_a_hint(tmp_path):
    with pytest.raises(TransientError) as caught:
        call({}, path=str(tmp_path / "none"))
    assert caught.value.hint == "systemctl start wnodesd"


def test_a_silent_daemon_costs_no_more_than_the_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with pytest.raises(TransientError, match="no answer within 0.1 s"):
            call({}, path=str(tmp_path / "s"), timeout_s=0.1)


def test_a_crowded_door_is_waited_at(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        with pytest.raises(TransientError, match="no answer within 0.2 s"):
            call({}, path=path, timeout_s=0.2)


@pytest.mark.parametrize("where", ["0.0.0.0:9", "example.org:9", "127.0.0.1", "127.0.0.1:x", "10.0.0.1:9"])
def test_metrics_are_for_this_node_only(where):
    with pytest.raises(SettingsError, match="loopback"):
        loopback(where)
