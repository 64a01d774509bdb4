"""``wnodes lsf install``: what it shows, checks, writes and takes out again."""

from __future__ import annotations

import pytest
from wnodes_lsf import cli, install

from wnodes_core.cli import main as wnodes
from wnodes_core.errors import SettingsError

OWN = "# the site's\nBegin Queue\nQUEUE_NAME = normal\nEnd Queue\n"


@pytest.fixture
def argv(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/eexec").write_text("#!/bin/sh\necho the site's\n")
    (tmp_path / "lsb.queues").write_text(OWN)
    where = {"serverdir": "etc", "queues": "lsb.queues", "prefix": "lib", "run-dir": "run"}
    return ["lsf", "install", *(word for key, name in where.items() for word in (f"--{key}", str(tmp_path / name)))]


def call(argv, *more):
    try:
        return wnodes([*argv, *more])
    except SystemExit as end:
        return end.code


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".wnodes-" not in path.name}


def test_dry_run_shows_all_and_changes_nothing(argv, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert call(argv, "--dry-run", "--image", "el9", "--app", "vmapp", "--generic-esub") == 0
    text = capsys.readouterr().out
    assert snapshot(tmp_path) == before
    for word in (
        "esub.wnodes",
        "elim.wnodes",
        f"+JOB_STARTER = exec {tmp_path}/lib/launch '%USRCMD'",
        "SUSPEND[SIGTSTP]",
    ):
        assert word in text
    assert (
        "img_el9  Numeric" in text and "Begin Application\nNAME = vmapp" in text and "JOB_INCLUDE_POSTPROC = Y" in text
    )


def test_apply_check_apply_again_and_uninstall_to_the_byte(argv, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert call(argv, "--check") == 1
    assert "missing: " in capsys.readouterr().out
    assert call(argv, "--apply") == 0
    assert call(argv, "--check") == 0
    capsys.readouterr()
    assert call(argv, "--apply") == 0 and "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "lib/eexec.site").read_text() == "#!/bin/sh\necho the site's\n"
    (tmp_path / "etc/esub.wnodes").chmod(0o644)
    assert call(argv, "--check") == 1
    assert call(argv, "--uninstall") == 0
    assert snapshot(tmp_path) == before


def test_a_site_s_own_queue_of_that_name_must_hold_our_lines(argv, tmp_path, capsys):
    (tmp_path / "lsb.queues").write_text(
        "Begin Queue\nQUEUE_NAME = vm\nREQUEUE_EXIT_VALUES = 99 EXCLUDE(122)\nEnd Queue\n"
    )
    assert call(argv, "--check") == 1
    said = capsys.readouterr().err
    assert "queue vm is the site's own" in said and "JOB_STARTER = exec" in said and "REQUEUE_EXIT_VALUES" not in said


@pytest.mark.parametrize(
    "change", [{"queue": "a b"}, {"images": ("x;y",)}, {"python": "/usr/bin/py thon"}, {"prefix": "relative"}]
)
def test_nothing_odd_gets_into_scripts(tmp_path, change):
    with pytest.raises(SettingsError):
        install.Site(**{"serverdir": tmp_path, "queues_file": tmp_path / "q", **change})


def test_without_lsb_queues_it_says_where_to_look(argv, tmp_path, capsys):
    (tmp_path / "lsb.queues").unlink()
    assert call(argv) == 1 and "name it with --queues" in capsys.readouterr().err
    assert cli.install is install
