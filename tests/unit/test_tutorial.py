"""The tutorial and the how-tos for plug-ins, typed as they stand: from an empty folder to a job in a VM."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docs_kit
import pytest
from venv_kit import Venv

from wnodes_core import processes

WORK = Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where other users can go (pytest's own is root's alone); nothing of it runs on afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="wnt-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    deadline = time.monotonic() + 20  # a builder of templates that lost its wnodesd takes its guest down first
    while (left := _of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        processes.kill(process)
    log = folder / "t" / "site" / "log"
    print(log.read_text() if log.exists() else "")
    shutil.rmtree(folder)
    assert not left, [" ".join(process.command)[:200] for process in left]


def _of(folder: Path) -> list[processes.Process]:
    table = processes.table()
    return [p for p in table if any(str(folder) in word for word in p.command) and processes.alive(p)]


def tutorial(folder: Path, user: pwd.struct_passwd, when: str, **more: str) -> None:
    venv = Venv(folder / "venv")
    (folder / "t").mkdir()
    environ = venv.environ(DOCS=str(docs_kit.DOCS), JOB_USER=user.pw_name, PYTHONDONTWRITEBYTECODE="1", **more)
    docs_kit.play("tutorial.md", folder / "t", environ, when=when)
    assert not (folder / "t/site/state/leases").exists() or not list((folder / "t/site/state/leases").iterdir())


def test_a_new_lrms_without_a_hypervisor(folder: Path, ordinary_user: pwd.struct_passwd) -> None:
    tutorial(folder, ordinary_user, "pretend")


@pytest.mark.guest
def test_a_new_lrms_with_a_real_guest(folder: Path, ordinary_user: pwd.struct_passwd, minimal_image: object) -> None:
    tutorial(folder, ordinary_user, "guest", IMAGE=str(WORK / "images/minimal"))


def test_plug_ins_for_images_storage_and_policy(folder: Path) -> None:
    venv = Venv(folder / "venv")
    (folder / "t").mkdir()
    docs_kit.play("howto-plugins.md", folder / "t", venv.environ(PYTHONDONTWRITEBYTECODE="1"))


def test_the_runner_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_kit, "DOCS", tmp_path)
    environ = {"PATH": os.environ["PATH"]}
    for text, message in (("$ echo a\nb\n", "the page says:\nb"), ("$ false\n", "exit code 1"), ("$ echo a\n", "printed:\na")):
        (tmp_path / "page.md").write_text(f"```console\n{text}```\n")
        with pytest.raises(AssertionError, match=message):
            docs_kit.play("page.md", tmp_path, environ)
    (tmp_path / "page.md").write_text("`a/b`:\n\n```text\n1\n```\n\n`a/b`, further:\n\n```text\n2\n```\n\n```console\n$ cat a/b\n1\n…\n2\n```\n")
    docs_kit.play("page.md", tmp_path, environ)
