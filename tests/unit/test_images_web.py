"""Fetching over HTTP from servers that behave, and from those that do not."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import FetchError, LimitExceeded, StateDirFull
from wnodes_core.images import web
from wnodes_core.images.hashing import Follower

BODY = hashlib.shake_256(b"image").digest(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Answers with ``answer(handler)``; notes each request's headers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Callable[[Any], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.asked: list[dict[str, str]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/image"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the game."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append({**dict(self.headers), ":path": self.path})
        self.server.answer(self)

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def reply(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def ranged(self, body: bytes, etag: str = '"one"', cut: int | None = None) -> None:
        """As nginx would: Range with If-Range; ``cut`` ends the connection after so many bytes."""
        wanted = self.headers.get("Range")
        start = 0
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(body) > 0 and wanted:
            self.reply(416, Content_Range=f"bytes */{len(body)}")
            return
        extra = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        part = body[start:]
        self.reply(206 if start else 200, part[:cut], length=len(part), ETag=etag, **extra)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], None]], Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(web, "BACKOFF_S", 0.001)
    servers: list[Server] = []

    def start(answer: Callable[[Any], None]) -> Server:
        server = Server(answer)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def fetch(url: str, into: Path, seconds: float = 30.0) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    web.fetch(url, into, time.monotonic() + seconds, lambda done, total: told.append((done, total)))
    return told


def test_the_whole_body_arrives_and_progress_is_told(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(200, BODY))
    told = fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert told[0] == (0, len(BODY)) and told[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("body", [b"", b"x", BODY[:65536], BODY[:65537]])
def test_small_bodies(serve: Any, tmp_path: Path, body: bytes) -> None:
    server = serve(lambda h: h.reply(200, body))
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == body


def test_it_goes_on_after_what_is_there(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.ranged(BODY))
    (tmp_path / "x").write_bytes(BODY[:1_000_000])
    told = fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert told[0] == (1_000_000, len(BODY))
    assert server.asked[0]["Range"] == "bytes=1000000-"


def test_a_connection_cut_again_and_again_is_resumed_with_the_etag(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.ranged(BODY, cut=400_000))
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert len(server.asked) == 8 > web.TRIES  # a try that brought bytes is not counted
    assert all(ask["If-Range"] == '"one"' for ask in server.asked[1:])


def test_a_changed_file_starts_over(serve: Any, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        if len(server.asked) == 1:
            handler.ranged(bytes(len(BODY)), etag='"old"', cut=500_000)
        else:
            handler.ranged(BODY, etag='"new"')

    server = serve(answer)
    follower = Follower(tmp_path / "x")
    web.fetch(server.url, tmp_path / "x", time.monotonic() + 30, lambda done, total: follower.announce(done))
    assert server.asked[1]["If-Range"] == '"old"'
    assert (tmp_path / "x").read_bytes() == BODY
    assert follower.finish() == f"sha256:{hashlib.sha256(BODY).hexdigest()}"


def test_a_server_without_range_starts_over(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(200, BODY))
    (tmp_path / "x").write_bytes(b"stale" * 1_000_000)  # longer than the body
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_a_partial_file_longer_than_the_image_starts_over(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.ranged(BODY))
    (tmp_path / "x").write_bytes(BODY + b"more")
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert len(server.asked) == 2


@pytest.mark.parametrize("content_range", ["bytes 5-9/10", "pages 1-2/3", ""])
def test_a_wrong_range_starts_over(serve: Any, tmp_path: Path, content_range: str) -> None:
    def answer(handler: Any) -> None:
        if "Range" in handler.headers:
            handler.reply(206, b"wrong", Content_Range=content_range)
        else:
            handler.reply(200, BODY)

    server = serve(answer)
    (tmp_path / "x").write_bytes(b"abc")
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_404_is_final(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(404, b"no"))
    with pytest.raises(FetchError, match=r"/image: HTTP 404"):
        fetch(server.url, tmp_path / "x")
    assert len(server.asked) == 1
    assert not (tmp_path / "x").exists()


def test_a_server_error_is_tried_again(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(503) if len(server.asked) < 3 else h.reply(200, BODY))
    fetch(server.url, tmp_path / "x")
    assert len(server.asked) == 3


def test_it_gives_up_after_fruitless_tries(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(503))
    with pytest.raises(FetchError, match="HTTP 503"):
        fetch(server.url, tmp_path / "x")
    assert len(server.asked) == web.TRIES


def test_a_stall_is_noticed_and_resumed(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "STALL_S", 0.2)

    def answer(handler: Any) -> None:
        if len(server.asked) == 1:
            handler.reply(200, BODY[:200_000], length=len(BODY), ETag='"one"')
            server.released.wait(10)
        else:
            handler.ranged(BODY)

    server = serve(answer)
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.asked[1]["Range"] == "bytes=200000-"


def test_a_server_that_never_answers(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "STALL_S", 0.05)
    server = serve(lambda h: server.released.wait(10))
    with pytest.raises(FetchError, match=r"no byte for 0\.05 s|timed out"):
        fetch(server.url, tmp_path / "x")


def test_the_deadline_ends_a_drip(serve: Any, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        handler.reply(200, b"", length=1 << 20)
        while not server.released.wait(0.02):
            handler.wfile.write(b"drip")
            handler.wfile.flush()

    server = serve(answer)
    began = time.monotonic()
    with pytest.raises(FetchError, match="not done in time"):
        fetch(server.url, tmp_path / "x", seconds=0.3)
    assert time.monotonic() - began < 3


def test_a_refused_connection(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(FetchError, match="refused"):
        fetch(server.url, tmp_path / "x")


def test_redirects_are_followed_but_only_over_http(serve: Any, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        target = {"/image": "/real", "/local": "file:///etc/passwd"}.get(handler.path)
        if target:
            handler.reply(302, Location=target)
        else:
            handler.ranged(BODY)

    server = serve(answer)
    (tmp_path / "x").write_bytes(BODY[:1000])
    fetch(server.url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.asked[-1]["Range"] == "bytes=1000-"
    with pytest.raises(FetchError, match="302"):
        fetch(server.url.replace("image", "local"), tmp_path / "y")


def test_chunked_and_unbounded_bodies(serve: Any, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        handler.send_response(200)
        if handler.path == "/chunked":
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")
        else:
            handler.end_headers()
            handler.wfile.write(b"hello")

    server = serve(answer)
    for path in ("chunked", "endless"):
        fetch(server.url.replace("image", path), tmp_path / path)
        assert (tmp_path / path).read_bytes() == b"hello"


def test_a_server_that_insists_on_gzip_is_refused(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(200, b"zip", Content_Encoding="gzip"))
    with pytest.raises(FetchError, match="insists on gzip"):
        fetch(server.url, tmp_path / "x")


def test_a_size_beyond_the_file_system_is_no_fault_of_the_host(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda h: h.reply(200, b"", length=1 << 60))
    with pytest.raises(LimitExceeded, match="the whole file system"):
        fetch(server.url, tmp_path / "x")


def test_no_room_is_told_before_the_disk_is_filled(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = web.os.statvfs

    class Full:
        f_frsize, f_bavail = 4096, 1

        def __init__(self, path: Path) -> None:
            self.f_blocks = real(path).f_blocks

    monkeypatch.setattr(web.os, "statvfs", Full)
    server = serve(lambda h: h.reply(200, BODY))
    with pytest.raises(StateDirFull, match="no space left for 3000000 bytes more"):
        fetch(server.url, tmp_path / "x")


def test_it_never_writes_through_a_link(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    server = serve(lambda h: h.reply(200, BODY))
    with pytest.raises(OSError, match="symbolic links"):
        fetch(server.url, tmp_path / "x")
    assert (tmp_path / "victim").read_bytes() == b""
