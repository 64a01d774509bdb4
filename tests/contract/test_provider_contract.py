"""Our own image sources keep the contract of every provider."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from wnodes_core.testing import ImageContract


class TestCopy(ImageContract):
    plugin = "wnodes_core.images.sources"

    def make_source(self, folder: Path, content: bytes) -> str:
        (folder / "image").write_bytes(content)
        return str(folder / "image")

    def make_missing(self, folder: Path) -> str:
        return str(folder / "absent")


class TestWeb(ImageContract):
    plugin = "wnodes_core.images.sources"

    @pytest.fixture(autouse=True)
    def server(self, tmp_path: Path) -> Iterator[None]:
        (tmp_path / "www").mkdir()
        handler = partial(_Quiet, directory=str(tmp_path / "www"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            yield
            server.shutdown()
            thread.join(5)

    def make_source(self, folder: Path, content: bytes) -> str:
        (folder / "www" / "image").write_bytes(content)
        return f"{self.url}/image"

    def make_missing(self, folder: Path) -> str:
        return f"{self.url}/absent"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass
