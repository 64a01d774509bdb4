"""What every image source must do, as tests that its author inherits.

::

    class TestTape(ImageContract):
        plugin = "wnodes_tape.plugin"

        def make_source(self, folder, content):     # where the provider finds ``content``
            ...
            return "tape:/pool/image"

        def make_missing(self, folder):              # a source of its kind that is not there
            return "tape:/pool/absent"
"""

from __future__ import annotations

import importlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.api import errors
from wnodes_core.plugins import Plugins

CONTENT = bytes(range(256)) * 8192 + b"tail"  # 2 MiB and a bit
FOREIGN = ("contract-nobodys://host/x", "contract-nobodys:x", "")
LONG_S = 60.0
Told = list[tuple[int, int]]


class ImageContract:
    """Fetch whole, go on after a stop, refuse clearly, leave other kinds alone."""

    plugin = ""

    def make_source(self, folder: Path, content: bytes) -> str:
        """A source of this provider that delivers ``content``."""
        raise NotImplementedError("say where the provider finds an image")

    def make_missing(self, folder: Path) -> str:
        """A source of this provider's kind that cannot deliver."""
        raise NotImplementedError("say what a missing image looks like")

    @pytest.fixture
    def hook(self) -> Any:
        """The hook relay with this plug-in alone."""
        plugins = Plugins(builtins=(), scan=False)
        plugins.register(importlib.import_module(self.plugin), "contract")
        assert plugins.found[-1].problem == ""
        return plugins.hook

    @pytest.fixture
    def into(self, tmp_path: Path) -> Path:
        """The store's private partial file; it does not exist yet."""
        (tmp_path / "store").mkdir()
        return tmp_path / "store" / "partial"

    def fetch(self, hook: Any, source: str, into: Path, *, seconds: float = LONG_S) -> tuple[Any, Told]:
        """What came of it, and the progress that was told."""
        told: Told = []
        found = hook.wnodes_image_fetch(
            source=source,
            into=into,
            deadline=time.monotonic() + seconds,
            progress=lambda done, whole: told.append((done, whole)),
        )
        return found, told

    def test_it_comes_whole(self, hook: Any, into: Path, tmp_path: Path) -> None:
        found, told = self.fetch(hook, self.make_source(tmp_path, CONTENT), into)
        assert found is True
        assert into.read_bytes() == CONTENT
        assert sorted(os.listdir(into.parent)) == ["partial"], "it left files of its own in the store"
        assert told and told[-1][0] == len(CONTENT), "progress ends with the size"
        assert all(whole in (0, len(CONTENT)) for _, whole in told)

    def test_a_valid_beginning_does_no_harm(self, hook: Any, into: Path, tmp_path: Path) -> None:
        into.write_bytes(CONTENT[:1_000_000])
        found, _ = self.fetch(hook, self.make_source(tmp_path, CONTENT), into)
        assert found is True
        assert into.read_bytes() == CONTENT

    def test_it_may_be_repeated(self, hook: Any, into: Path, tmp_path: Path) -> None:
        source = self.make_source(tmp_path, CONTENT)
        for _ in range(2):
            assert self.fetch(hook, source, into)[0] is True
            assert into.read_bytes() == CONTENT

    def test_an_empty_image_is_no_hang(self, hook: Any, into: Path, tmp_path: Path) -> None:
        """Delivered as it is, or refused: the store looks at formats."""
        source = self.make_source(tmp_path, b"")
        try:
            assert self.fetch(hook, source, into)[0] is True
        except errors.WnodesError as error:
            assert not isinstance(error, errors.HostError)

    def test_what_is_missing_is_a_fetch_error_that_names_it(self, hook: Any, into: Path, tmp_path: Path) -> None:
        source = self.make_missing(tmp_path)
        with pytest.raises(errors.FetchError) as caught:
            self.fetch(hook, source, into)
        assert source.rpartition("/")[2] in str(caught.value), "say which source"

    def test_a_deadline_that_is_over_ends_it(self, hook: Any, into: Path, tmp_path: Path) -> None:
        """Either it was so quick, or it gives up: it never goes on for long."""
        began = time.monotonic()
        with suppress(errors.FetchError):
            self.fetch(hook, self.make_source(tmp_path, CONTENT), into, seconds=-1)
        assert time.monotonic() - began < LONG_S / 2

    @pytest.mark.parametrize("source", FOREIGN)
    def test_other_kinds_are_left_to_others(self, hook: Any, into: Path, source: str) -> None:
        assert self.fetch(hook, source, into)[0] is None
        assert not into.exists()
