"""The scripts that BLAH sources: a wish becomes one strict line, anything else a line that is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HOOKS = Path(__file__).parents[2] / "hooks/blah"
LINES = {
    "condor": {
        "image": "vm_image = {}\n",
        "all": 'vm_image = el9\nvm = "cpus=2,memory=4G"\n',
        "memory": 'vm = "memory=4G"\n',
    },
    "slurm": {
        "image": "#SBATCH --vm-image={}\n",
        "all": "#SBATCH --vm-image=el9\n#SBATCH --vm=cpus=2,memory=4G\n",
        "memory": "#SBATCH --vm=memory=4G\n",
    },
    "lsf": {
        "image": '#BSUB -a "wnodes(image={})"\n',
        "all": '#BSUB -a "wnodes(image=el9,cpus=2,memory=4G)"\n',
        "memory": '#BSUB -a "wnodes(memory=4G)"\n',
    },
}
SHELLS = ("dash", "bash")
shells = pytest.mark.parametrize("shell", SHELLS)
systems = pytest.mark.parametrize("lrms", sorted(LINES))


def source(shell: str, lrms: str, script: Path | None = None, **variables: str) -> str:
    """What sourcing the script prints; it must print nothing else and succeed under ``set -eu``."""
    path = script or HOOKS / f"{lrms}_local_submit_attributes.sh"
    argv = [f"/bin/{shell}", "-euc", f". {path}"]
    done = subprocess.run(argv, env=variables, capture_output=True, timeout=10)
    assert done.returncode == 0 and (not done.stderr or "BASH_ENV" in variables), done  # bash itself grumbles at those
    return done.stdout.decode(errors="surrogateescape")


@shells
@systems
def test_a_wish_becomes_directives_and_no_wish_nothing(shell, lrms):
    assert source(shell, lrms) == ""
    assert source(shell, lrms, WnodesImage="el9:2026.1") == LINES[lrms]["image"].format("el9:2026.1")
    assert source(shell, lrms, WnodesImage="el9", WnodesCpus="2", WnodesMemory="4G") == LINES[lrms]["all"]
    assert source(shell, lrms, WnodesMemory="4G") == LINES[lrms]["memory"]


@shells
@systems
def test_a_hostile_environment_changes_nothing(shell, lrms):
    hostile = {"PATH": "/nonexistent", "IFS": "e9l", "LC_ALL": "en_US.UTF-8", "BASH_ENV": "/nonexistent", "CDPATH": "/"}
    wanted = LINES[lrms]["image"].format("el9")
    assert source(shell, lrms, WnodesImage="el9", **hostile) == wanted


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=40).filter(lambda data: b"\0" not in data), st.sampled_from(sorted(LINES)))
def test_no_value_can_print_anything_but_one_word_or_a_dash(value, lrms):
    printed = source("dash", lrms, WnodesImage=value)  # type: ignore[arg-type]
    plain = set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.:@_-")
    fits = set(value) <= plain and chr(value[0]).isalnum()
    assert printed == LINES[lrms]["image"].format(value.decode() if fits else "-")


@systems
@pytest.mark.parametrize("value", ['a\n#BSUB -q other', "$(id)", "`id`", 'a" -q x "', "a b", "é", "-x", "a)", "x" * 100000 + ";"])
def test_what_does_not_fit_is_a_dash(lrms, value):
    assert source("bash", lrms, WnodesImage=value) == LINES[lrms]["image"].format("-")


@shells
@systems
def test_a_vo_s_default_image_is_for_jobs_that_name_none(shell, lrms, tmp_path):
    images = tmp_path / "vo-images"
    script = tmp_path / "script.sh"
    script.write_text((HOOKS / f"{lrms}_local_submit_attributes.sh").read_text().replace("/etc/wnodes/vo-images", str(images)))
    images.write_text("atlas   el9:2026.1\n\n# lhcb x\nlhcb debian12 # more\n")
    assert source(shell, lrms, script, WnodesVO="atlas") == LINES[lrms]["image"].format("el9:2026.1")
    assert source(shell, lrms, script, WnodesVO="lhcb", IFS="xyz") == LINES[lrms]["image"].format("debian12")
    assert source(shell, lrms, script, WnodesVO="atlas", WnodesImage="own") == LINES[lrms]["image"].format("own")
    for vo in ("cms", "", "#", "* ", "$(id)"):
        assert source(shell, lrms, script, WnodesVO=vo) == ""
    assert source(shell, lrms, script) == ""


def test_the_refused_word_is_refused_by_both_ends():
    from wnodes_lsf import native

    from wnodes_core.errors import BadRequest
    from wnodes_core.model import ImageRef

    with pytest.raises(BadRequest):
        ImageRef.parse("-")  # as Slurm's plug-in and Prolog
    with pytest.raises(BadRequest):
        native.parse_request(native.request_text("wnodes(image=-)") or "")
