"""``wnodes slurm install`` on folders of its own: nothing lost, nothing twice, all of it undone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest
from wnodes_slurm import cli, install, slurmconf

from wnodes_core import command
from wnodes_core.errors import SettingsError

SITE_CONF = """\
ClusterName=site
Prolog=/etc/slurm/site-prolog.sh   # ours since 2014
prologflags=X11
LaunchParameters=slurmstepd_memlock
HealthCheckProgram=/usr/sbin/nhc
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> install.Site:
    """A site with a Prolog, flags and a health check of its own; the version query needs no Slurm."""
    monkeypatch.setattr(install, "slurm_version", lambda site: "22.05.8")
    (tmp_path / "slurm.conf").write_text(SITE_CONF)
    (tmp_path / "plugstack.conf").write_text("optional /usr/lib/slurm/other.so")
    return install.Site(tmp_path / "slurm.conf", tmp_path / "lib", tmp_path / "run", sys.executable)


def run(site: install.Site, mode: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    argv = ["slurm", "install", f"--{mode}", f"--slurm-conf={site.slurm_conf}", f"--prefix={site.prefix}"]
    args = parser.parse_args([*argv, f"--run-dir={site.run_dir}", f"--python={site.python}"])
    return int(args.func(args))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_apply_keeps_what_the_site_has(site: install.Site) -> None:
    assert run(site, "apply") == 0
    text = site.slurm_conf.read_text()
    assert slurmconf.value_of(text, "Prolog") == f"{site.prefix}/prolog.d/*"
    assert (site.prefix / "prolog.d/60-site").readlink() == Path("/etc/slurm/site-prolog.sh")
    assert (site.prefix / "prolog.d/50-wnodes").readlink() == site.prefix / "prolog"
    assert slurmconf.value_of(text, "Epilog") == f"{site.prefix}/epilog"
    assert slurmconf.value_of(text, "PrologFlags") == "X11,Alloc,DeferBatch,Contain"
    assert slurmconf.value_of(text, "LaunchParameters") == "slurmstepd_memlock,use_interactive_step"
    assert slurmconf.value_of(text, "HealthCheckProgram") == "/usr/sbin/nhc"
    plugstack = site.slurm_conf.with_name("plugstack.conf").read_text().splitlines()
    assert plugstack[0] == "optional /usr/lib/slurm/other.so" and site.plugstack_line in plugstack


def test_apply_twice_changes_nothing_and_check_is_content(site: install.Site) -> None:
    assert run(site, "check") == 1
    run(site, "apply")
    before = snapshot(site.slurm_conf.parent)
    assert run(site, "apply") == 0 and run(site, "check") == 0
    assert snapshot(site.slurm_conf.parent) == before


def test_dry_run_writes_nothing(site: install.Site, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(site.slurm_conf.parent)
    assert run(site, "dry-run") == 0
    assert snapshot(site.slurm_conf.parent) == before
    shown = capsys.readouterr().out
    assert "+PrologFlags=X11,Alloc,DeferBatch,Contain" in shown and site.plugstack_line in shown


def test_check_names_what_is_missing(site: install.Site, capsys: pytest.CaptureFixture[str]) -> None:
    run(site, "apply")
    (site.prefix / "epilog").chmod(0o644)
    (site.prefix / "wnodes_vm.so").unlink()
    capsys.readouterr()
    assert run(site, "check") == 1
    shown = capsys.readouterr().out
    assert f"missing: {site.prefix}/epilog" in shown and "wnodes_vm.so: not built" in shown


def test_uninstall_gives_back_every_byte(site: install.Site) -> None:
    run(site, "apply")
    assert run(site, "uninstall") == 0
    assert site.slurm_conf.read_text() == SITE_CONF
    assert site.slurm_conf.with_name("plugstack.conf").read_text().strip() == "optional /usr/lib/slurm/other.so"
    assert not site.prefix.exists()


def test_sites_own_glob_gets_a_link(site: install.Site) -> None:
    folder = site.slurm_conf.with_name("prolog.d")
    site.slurm_conf.write_text(f"Prolog={folder}/*.sh\n")
    run(site, "apply")
    assert (folder / "50-wnodes.sh").readlink() == site.prefix / "prolog"
    assert slurmconf.value_of(site.slurm_conf.read_text(), "Prolog") == f"{folder}/*.sh"
    run(site, "uninstall")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PrologFlags=Alloc,Serial\n", "want it without Serial"),
        ("Prolog=/a\nProlog=/b\n", "stands 2 times"),
        ("Include more.conf\n", "want Prolog in slurm.conf itself"),
    ],
)
def test_what_a_person_must_decide_is_refused(site: install.Site, text: str, message: str) -> None:
    site.slurm_conf.write_text(text)
    site.slurm_conf.with_name("more.conf").write_text("Prolog=/x\n")
    with pytest.raises(SettingsError, match=message):
        install.plan(site)


@pytest.mark.parametrize("path", ["/a b", "relative", "/x;id", "/x\n", "/" + "a" * 200])
def test_paths_that_a_shell_would_split_are_refused(path: str) -> None:
    with pytest.raises(SettingsError, match="want an absolute path"):
        install.Site(Path("/etc/slurm/slurm.conf"), Path(path))


def test_hooks_leave_an_ordinary_job_without_python(site: install.Site) -> None:
    """Each hook's time for a job that wants no VM, against an empty Python: no Python at all is the aim."""
    run(site, "apply")
    environ = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n0"}

    def seconds(argv: list[str]) -> float:
        taken = []
        for _ in range(15):
            started = time.perf_counter()
            command.run(argv, environ=environ)
            taken.append(time.perf_counter() - started)
        return min(taken)

    python = seconds([sys.executable, "-I", "-c", "pass"])
    for hook in ("prolog", "epilog", "healthcheck"):
        taken = seconds([str(site.prefix / hook)])
        print(f"{hook}: {taken * 1000:.1f} ms, python3 -I -c pass: {python * 1000:.1f} ms")
        assert taken < python, hook


def test_prolog_turns_a_crash_into_a_cancel(site: install.Site, tmp_path: Path) -> None:
    """Exit 1 is Python's own word for a traceback: only 100 may drain."""
    for code, expected in ((0, 0), (100, 1)):
        script = _rendered(site, tmp_path, f"exit {code}")
        assert command.run([script], environ={"SPANK_VM_IMAGE": "x"}, check=False).exit_code == expected
    for code in (1, 2, 127, 139):
        script = _rendered(site, tmp_path, f"exit {code}")
        done = command.run([script], environ={"SPANK_VM_IMAGE": "x", "SLURM_CONF": str(site.slurm_conf)}, check=False)
        assert done.exit_code == 0 and b"scancel" in done.stderr, done


def _rendered(site: install.Site, tmp_path: Path, body: str) -> str:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    other = install.Site(site.slurm_conf, site.prefix, site.run_dir, str(python))
    step = next(step for step in install.plan(other) if step.path.name == "prolog")
    step.apply()
    return str(step.path)


def test_plugin_compiles_without_a_warning(site: install.Site) -> None:
    install.build(site)  # -Wall -Wextra -Werror
    assert install.built(site)
