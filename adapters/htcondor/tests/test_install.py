"""What install writes, checks, takes out; on a real HTCondor's own configuration of both releases."""

import argparse
import re
from pathlib import Path

import pytest
from wnodes_htcondor import cli, condorconf, debs, install, native
from wnodes_htcondor.lab import Lab

from wnodes_core import tools
from wnodes_core.errors import SettingsError

HERE = Path(install.__file__).parent


def wnodes(lab, mode, prefix, capsys, **more):
    """Run ``wnodes htcondor install --MODE`` on a lab's configuration: exit code, stdout, stderr."""
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    words = [f"--{name}={value}" for name, value in {"prefix": prefix, **more}.items()]
    args = parser.parse_args(["htcondor", "install", f"--{mode}", *words])
    code = cli.run(args, lab.environ)
    return (code, *capsys.readouterr())


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path / "lab")
    made.write()
    return made


@pytest.mark.condor
def test_apply_check_uninstall(lab, tmp_path, capsys):
    prefix = tmp_path / "hooks"
    code, out, _ = wnodes(lab, "check", prefix, capsys)
    assert code == 1 and "60-wnodes-execute.conf: without it no job lands in a VM" in out
    code, out, _ = wnodes(lab, "dry-run", prefix, capsys)
    assert code == 0 and "+SINGULARITY = " in out and not prefix.exists()
    assert wnodes(lab, "apply", prefix, capsys)[0] == 0
    assert (prefix / "runtime").stat().st_mode & 0o777 == 0o755
    text = "".join(p.read_text() for p in prefix.iterdir() if p.name != "sshd_config")
    assert not re.findall("@[A-Z]+@", text)
    before = {p: p.read_bytes() for p in (*prefix.iterdir(), *lab.config_d.iterdir())}
    code, out, _ = wnodes(lab, "apply", prefix, capsys)  # again, now that our own lines are what HTCondor says
    assert code == 0 and "nothing to do" in out
    assert before == {p: p.read_bytes() for p in (*prefix.iterdir(), *lab.config_d.iterdir())}
    assert wnodes(lab, "check", prefix, capsys)[0] == 0
    assert wnodes(lab, "uninstall", prefix, capsys)[0] == 0
    assert not prefix.exists() and not list(lab.config_d.iterdir())
    assert wnodes(lab, "uninstall", prefix, capsys)[0] == 0


@pytest.mark.condor
@pytest.mark.parametrize(
    "line", ["SINGULARITY_JOB = False", "SINGULARITY = /usr/bin/apptainer", 'SINGULARITY_IMAGE_EXPR = "x.sif"']
)
def test_a_later_file_that_would_put_vm_jobs_on_the_host_is_named(lab, tmp_path, capsys, line):
    prefix = tmp_path / "hooks"
    assert wnodes(lab, "apply", prefix, capsys)[0] == 0
    (lab.config_d / "90-site.conf").write_text(line + "\n")
    code, out, _ = wnodes(lab, "check", prefix, capsys)
    assert code == 1 and f"overridden: {line.partition(' ')[0]} = " in out and "complete" not in out
    (lab.config_d / "90-site.conf").unlink()
    assert wnodes(lab, "check", prefix, capsys)[0] == 0


@pytest.mark.condor
def test_the_sites_own_runtime_and_expressions_are_kept(lab, tmp_path, capsys):
    own = tmp_path / "apptainer"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    (lab.config_d / "10-site.conf").write_text(
        f'SINGULARITY = {own}\nSINGULARITY_JOB = TARGET.Mine isnt undefined\nSINGULARITY_IMAGE_EXPR = "/x.sif"\n'
        'EXTENDED_SUBMIT_COMMANDS @=end\n  site_word = "x"\n@end\nJOB_TRANSFORM_NAMES = Site\n'
    )
    for _ in range(2):
        assert wnodes(lab, "apply", tmp_path / "hooks", capsys)[0] == 0
    assert f'"{own}"' in (tmp_path / "hooks/runtime").read_text()
    assert "HasSingularity" not in (lab.config_d / install.EXECUTE_CONF).read_text()
    config, _ = install.ask(lab.environ)
    assert config["SINGULARITY_JOB"].endswith("|| (TARGET.Mine isnt undefined)")
    assert '"/x.sif"' in config["SINGULARITY_IMAGE_EXPR"]
    assert config["JOB_TRANSFORM_NAMES"].split() == ["Site", "WnodesName", "Wnodes", "WnodesImage"]
    assert "site_word" in lab.run(["condor_config_val", "EXTENDED_SUBMIT_COMMANDS"])


@pytest.mark.condor
@pytest.mark.parametrize(("release", "warned"), [("23", True), ("25", False)])
def test_a_starter_hook_is_warned_of_before_24_8_1(release, warned, tmp_path, capsys):
    lab = Lab(tmp_path / "lab", release=release)
    lab.write()
    (lab.config_d / "10-site.conf").write_text("WN_HOOK_JOB_EXIT = /site/hook\n")
    code, _, err = wnodes(lab, "check", tmp_path / "hooks", capsys)
    assert code == 1 and ("warning: WN_HOOK_JOB_EXIT = /site/hook: on HTCondor 23.9.6" in err) is warned


@pytest.mark.parametrize(
    ("version", "hooks"),
    [((24, 8, 0), 3), ((23, 10, 21), 3), ((24, 8, 1), 0), ((25, 0, 1), 0)],
)
def test_from_which_release_on_hooks_are_safe(version, hooks):
    names = ["WN_HOOK_PREPARE_JOB", "HOOK_UPDATE_JOB_INFO", "X2_HOOK_JOB_EXIT"]
    names += ["WN_HOOK_JOB_EXIT_TIMEOUT", "STARTER_JOB_HOOK_KEYWORD"]
    site = install.Site({"LOCAL_CONFIG_DIR": "/etc/condor/config.d", **dict.fromkeys(names, "/x")}, version)
    assert len(install.warnings(site)) == hooks


def test_nothing_of_ours_is_a_starter_hook():
    texts = [condorconf.EXECUTE, condorconf.NO_APPTAINER, condorconf.SUBMIT]
    assert "_HOOK_" not in "".join(texts) and "JOB_HOOK_KEYWORD" not in "".join(texts)


@pytest.mark.parametrize("path", ["/x y", "relative", '/x"y', "/x$(y)", "/x\ny"])
def test_paths_that_would_mean_something_to_a_shell_or_to_htcondor_are_refused(path):
    with pytest.raises(SettingsError, match="want an absolute path"):
        install.Site({"LOCAL_CONFIG_DIR": "/etc/condor/config.d"}, (23, 9, 6), prefix=Path(path))


def test_no_htcondor_is_an_error_with_a_hint():
    with pytest.raises(SettingsError, match="HTCondor does not answer"):
        install.ask({"PATH": "/nowhere"})


@pytest.mark.condor
def test_the_runtime_hands_on_what_is_not_ours(lab, tmp_path, capsys):
    """A stand-in for apptainer, which Debian 12 does not have: it shows what it was called with."""
    own = tmp_path / "apptainer"
    own.write_text('#!/bin/sh\necho "apptainer $*"\n')
    own.chmod(0o755)
    prefix = tmp_path / "hooks"
    alone = tmp_path / "alone"
    assert wnodes(lab, "apply", alone, capsys)[0] == 0
    (lab.config_d / install.EXECUTE_CONF).unlink()
    (lab.config_d / "10-site.conf").write_text(f"SINGULARITY = {own}\n")
    assert wnodes(lab, "apply", prefix, capsys)[0] == 0
    words = ["-s", "exec", "-S", "/tmp", "-W", "/s", "--pwd", "/s", "-B", "/s", "-C", "/img.sif", "/s/job", "wnodes:x"]
    assert tools.run([str(prefix / "runtime"), *words]).text == f"apptainer {' '.join(words)}\n"
    assert tools.run([str(prefix / "runtime"), "--version"]).text == "apptainer --version\n"
    assert tools.run([str(alone / "runtime"), "--version"]).text.startswith("wnodes runtime ")
    refused = tools.run([str(alone / "runtime"), *words], check=False)
    assert refused.exit_code == 255 and b"image '/img.sif': this node has no apptainer" in refused.stderr
    probe = ["exec", "-C", "/x/exit_37.sif", "/exit_37"]  # the startd's probe for HasSIF
    assert tools.run([str(alone / "runtime"), *probe], check=False).exit_code != 37


def test_an_unknown_release_is_refused(tmp_path):
    with pytest.raises(Exception, match="release '24': want one of 23, 25"):
        debs.prefix("24", tmp_path)


def test_sub_codes_of_the_readme_are_those_of_the_code():
    from wnodes_htcondor.task import SUB_CODES

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert {code for _, code in SUB_CODES} == {code for code in range(100, 120) if f"| {code} |" in readme}
    assert native.PREFIX in condorconf.EXECUTE
