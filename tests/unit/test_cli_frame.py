"""The frame of the command line: exit codes, errors, laziness, help, completion, reference pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wnodes_core import cli
from wnodes_core.cli import completion, output, parsers, reference
from wnodes_core.errors import BadRequest, NoKvm, TransientError, Verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def failing(mocker):
    """``wnodes config check`` that raises what the test gives."""

    def run(error: BaseException) -> int:
        mocker.patch("wnodes_core.settings.load", side_effect=error)
        return cli.main(["config", "check"])

    return run


def test_every_verdict_has_an_exit_code() -> None:
    assert set(cli.EXIT_CODES) == set(Verdict)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (BadRequest("cpus 'x'", hint="a number"), 1, "wnodes: error: cpus 'x'\n  hint: a number\n"),
        (TransientError("later"), 75, "wnodes: error: later\n"),
        (NoKvm("sick"), 69, "wnodes: error: sick\n"),
        (KeyboardInterrupt(), 130, ""),
        (BadRequest("\x1b[2Jtwo\nlines"), 1, "wnodes: error: \\x1b[2Jtwo\nlines\n"),
    ],
)
def test_errors_become_exit_codes(failing, capsys, error: BaseException, code: int, said: str) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == said


def test_a_bug_is_told_without_a_traceback(failing, capsys, monkeypatch) -> None:
    assert failing(RuntimeError("oops")) == 70
    said = capsys.readouterr().err
    assert said.startswith("wnodes: bug: RuntimeError: oops\n  hint: ") and "Traceback" not in said
    monkeypatch.setenv("WNODES_DEBUG", "1")
    assert failing(BadRequest("x")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_nobody_reads(tmp_path: Path) -> None:
    code = "import sys; from wnodes_core.cli import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from wnodes_core.cli import main; sys.exit(main(['config', 'show']))"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, ""), code


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "required: COMMAND"),
        (["leas"], "no command 'leas': did you mean 'lease'?"),
        (["xyzzy"], "no command 'xyzzy': want one of run, image"),
        (["config"], "required: COMMAND"),
        (["config", "chekc"], "invalid choice"),
        (["lease", "show"], "required: LEASE"),
        (["lease", "console", "-n", "x", "1"], "'x': want a whole number"),
        (["completion", "tcsh"], "invalid choice"),
    ],
)
def test_wrong_usage_is_2(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_version_imports_next_to_nothing() -> None:
    code = (
        "import sys; from wnodes_core.cli import main; main(['--version']); "
        "print([m for m in ('argparse', 'yaml', 'pluggy', 'json', 'libvirt', 'lxml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("wnodes ")
    assert done.stdout.splitlines()[1] == "[]"


def test_one_command_does_not_import_the_others() -> None:
    code = (
        "import sys; from wnodes_core.cli import main; main(['config', 'check']); "
        "print(sorted(m for m in sys.modules if m.startswith('wnodes_core.cli.')))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(
        ["wnodes_core.cli.config", "wnodes_core.cli.output", "wnodes_core.cli.parsers"]
    )


def test_the_table_of_commands_says_what_the_commands_say() -> None:
    found = {name: about for name, (_, about) in parsers.subcommands(parsers.build_all()).items()}
    assert found == {name: about for name, (_, about) in parsers.COMMANDS.items()}


def leaves(parser, name="wnodes"):
    below = parsers.subcommands(parser)
    if not below:
        yield name, parser
    for word, (child, _) in below.items():
        yield from leaves(child, f"{name} {word}")


COMMANDS = dict(leaves(parsers.build_all()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    parser = COMMANDS[name]
    assert parser.description and parser.epilog and "examples:" in parser.epilog
    assert f"{name}" in parser.epilog
    assert all(action.help for action in parsers.options(parser) if action.option_strings)
    assert parser.get_default("func")
    assert name in parser.format_help()


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in parsers.COMMANDS)
    assert "examples:" in said and "exit codes:" in said and "WNODES_CONFIG" in said


class Adapter:
    """An adapter's command, as its module would be."""

    @staticmethod
    def add_parser(subparsers) -> None:
        parser = subparsers.add_parser("toy", help="x")
        parser.set_defaults(func=lambda args: 7)


class Entry:
    """A metadata entry point."""

    name, value = "toy", "wnodes_toy.cli"

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_adapters_bring_commands(mocker, capsys) -> None:
    mocker.patch("importlib.metadata.entry_points", return_value=[Entry(Adapter)])
    assert cli.main(["toy"]) == 7
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "toy" in capsys.readouterr().out


def test_a_broken_adapter_breaks_only_its_own_command(mocker, capsys) -> None:
    mocker.patch("importlib.metadata.entry_points", return_value=[Entry(ImportError("gone"))])
    assert cli.main(["toy"]) == 1
    assert "command 'toy' of wnodes_toy.cli: ImportError: gone" in capsys.readouterr().err
    assert cli.main(["completion", "bash"]) == 0


def complete(words: list[str]) -> list[str]:
    """What bash offers after these words (the last one is being typed)."""
    cli_words = " ".join(f"'{word}'" for word in words)
    script = f"""
        source /dev/stdin
        COMP_WORDS=({cli_words}); COMP_CWORD={len(words) - 1}
        _wnodes
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    text = completion.SHELLS["bash"](list(completion._places(parsers.build_all(), "")))
    done = subprocess.run(["bash", "-c", script], input=text, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_down_the_tree() -> None:
    assert complete(["wnodes", "le"]) == ["lease"]
    assert complete(["wnodes", "lease", "re"]) == ["release"]
    assert complete(["wnodes", "lease", "release", "--y"]) == ["--yes"]
    assert complete(["wnodes", "lease", "console", "some-id", "--f"]) == ["--follow"]
    assert set(complete(["wnodes", "completion", ""])) == {"bash", "zsh", "fish", "--help"}
    assert complete(["wnodes", "run", "--", "ls", ""]) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, capsys) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name.removeprefix("wnodes ") in script for name in COMMANDS)
    assert "--json" in script if shell != "fish" else "-l json" in script


@pytest.mark.parametrize("name", ["cli.md", "settings.md", "wnodes.yaml.example"])
def test_the_reference_pages_are_up_to_date(name: str) -> None:
    path = ROOT / "docs" / name
    wanted = reference.pages()[name]
    if os.environ.get("WNODES_REGENERATE") == "1":
        path.write_text(wanted, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == wanted, "run: python -m wnodes_core.cli.reference docs"


def test_the_reference_is_written(tmp_path: Path, capsys) -> None:
    assert reference.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(reference.pages())


def test_tables_align_wide_and_hostile_text() -> None:
    assert output.table(["A", "N"], [["日本", 1], ["\x1b[31m", 22]], right=[1]) == (
        "A          N\n日本       1\n\\x1b[31m  22"
    )


def test_colour_only_where_wanted(monkeypatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    assert output.paint("x", "red", sys.stdout) == "x"


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59, "59s"), (3600, "1h"), (3660, "1h1m"), (8 * 86400, "1w1d")])
def test_ages(seconds: float, text: str) -> None:
    assert output.age(seconds) == text


def test_json_is_plain(capsys) -> None:
    output.print_json({"b": "é", "a": 1})
    assert json.loads(capsys.readouterr().out) == {"b": "é", "a": 1}
