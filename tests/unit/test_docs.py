"""The docs: they build without a warning, and no sample on them is one that nothing runs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import docs_kit
import pytest

from wnodes_core.api import VmRequest
from wnodes_core.cli import parsers

ROOT = docs_kit.DOCS.parent
GENERATED = ("cli.md", "settings.md")
# Which test runs the fences of a page, by page and language.
RUN_BY = {
    ("tutorial.md", "console"): "test_tutorial", ("howto-plugins.md", "console"): "test_tutorial",
    ("howto.md", "yaml"): "test_howto", ("howto.md", "python"): "test_howto",
    ("storage.md", "yaml"): "test_network_policy", ("network.md", "yaml"): "test_network_policy", ("network.md", "console"): "test_docs",
    ("grid.md", "yaml"): "test_policy_become",
    ("hooks.md", "python"): "test_house", ("benchmarks.md", "sh"): "test_docs", ("index.md", "{toctree}"): "test_docs",
}  # fmt: skip
PAGES = sorted(path.name for path in docs_kit.DOCS.glob("*.md"))


def test_they_build_without_a_warning(tmp_path: Path) -> None:
    argv = [sys.executable, "-P", "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", tmp_path / "d", docs_kit.DOCS, tmp_path / "html"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f"{Path(page).stem}.html" for page in PAGES} <= {path.name for path in (tmp_path / "html").iterdir()}


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text((docs_kit.DOCS / "conf.py").read_text())
    (tmp_path / "index.md").write_text("# x\n\n[gone](gone.md)\n")
    argv = [sys.executable, "-P", "-m", "sphinx", "-W", "-n", "-q", tmp_path, tmp_path / "html"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and "gone" in done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_sample_is_run_by_something(page: str) -> None:
    idle = []
    for block in docs_kit.blocks(page):
        played = not block.language or ((page, "console") in RUN_BY and block.path)  # without a language: output, no code
        if page not in GENERATED and not played and (page, block.language) not in RUN_BY and not _of_the_site(page, block):
            idle.append(f"line {block.line}: {block.language}")
    assert not idle, idle


def _of_the_site(page: str, block: docs_kit.Block) -> bool:
    """The one piece of TOML that howto.md shows is part of the package that test_scaffold installs."""
    scaffold = (ROOT / "wnodes_core/scaffold/common/pyproject.toml.txt").read_text()
    return page == "howto.md" and block.language == "toml" and block.text.splitlines()[0] in scaffold


def test_benchmark_commands_exist() -> None:
    commands = [line.split()[0] for block in docs_kit.blocks("benchmarks.md") for line in block.text.splitlines() if line.strip()]
    assert commands and all((ROOT / command).exists() for command in commands)


def test_the_examples_of_the_command_line_are_in_its_grammar() -> None:
    """Every ``wnodes …`` below "examples:" in cli.md parses: options exist, arguments are enough."""
    lines = [line.strip() for block in docs_kit.blocks("cli.md") for line in block.text.partition("examples:\n")[2].splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("wnodes ") and not set(line) & set("|&<>(")]
    assert len(words) > 20
    for each in words:
        try:
            parsers.build(each[1:]).parse_args(each[1:])
        except SystemExit as end:
            assert end.code == 0, each


def test_requests_that_pages_show_are_in_the_grammar() -> None:
    lines = [line for block in docs_kit.blocks("network.md") if block.language == "console" for line in block.text.splitlines()]
    for line in lines:
        words = shlex.split(line.removeprefix("$ "))
        if words[0] == "wnodes":
            assert parsers.build(words[1:]).parse_args(words[1:])
        assert all(VmRequest.parse(word.removeprefix("--vm=")) for word in words if word.startswith("--vm="))
    assert lines


def test_the_toy_is_small() -> None:
    assert len((docs_kit.DOCS / "toy/toyq").read_text().splitlines()) <= 140
