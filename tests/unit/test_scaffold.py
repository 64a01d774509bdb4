"""``wnodes plugin new``: what it writes is installed by pip, found, traced, and keeps its contract; a broken one is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from venv_kit import Venv

from wnodes_core import scaffold
from wnodes_core.errors import BadRequest, WnodesError


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    return Venv(tmp_path_factory.mktemp("venv") / "v")


@pytest.fixture
def installed(venv: Venv, tmp_path: Path) -> Iterator[Path]:
    """A fresh policy package, installed."""
    scaffold.write("chem", "policy", tmp_path / "wnodes-chem")
    venv.install(tmp_path / "wnodes-chem")
    yield tmp_path / "wnodes-chem"
    venv.uninstall("wnodes-chem")


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_a_new_package_works_as_it_is(venv: Venv, tmp_path: Path, kind: str) -> None:
    name = f"my{kind}"
    done = venv.run(venv.folder / "bin" / "wnodes", "plugin", "new", name, "--kind", kind, cwd=tmp_path)
    folder = tmp_path / f"wnodes-{name}"
    assert str(folder.relative_to(tmp_path) / f"wnodes_{name}/plugin.py") in done.stdout.splitlines()
    venv.install(folder)
    try:
        found = venv.plugins()[name]
        assert (found["origin"], found["api_level"], found["problem"]) == (f"wnodes-{name} 0.1.0", 1, "")
        assert found["kind"] == ("adapter" if kind == "lrms" else "plug-in")
        passed = re.search(r"(\d+) passed", venv.test(folder / "tests").stdout)
        assert passed and int(passed[1]) >= 3
        if kind == "lrms":
            assert "2 passed" in venv.test(Path(f"wnodes_{name}"), "--doctest-modules", "--pyargs").stdout
    finally:
        venv.uninstall(f"wnodes-{name}")


# A change that breaks the package's promise, and the test of the contract that must see it.
BREAKS = {
    "python for everybody": ("hooks/prolog", r'\[ -n "\$\{MINE_VM-\}" \] \|\| exit 0\n', "", "starts_no_python"),
    "python with the user's path": ("hooks/prolog", "@PYTHON@ -I -c", "@PYTHON@ -c", "users_environment"),
    "a bug drains the host": ("hooks/prolog", r"\*\) exit 1", "*) exit 100", "every_outcome_has_its_native_answer"),
    "bare run when refused": ("hooks/launch", "sys.exit.main.*", "import os; os.execv(sys.argv[1], sys.argv[1:])", "never_runs_bare"),
    "a default": ("plugin.py", r"job: Job \| None\)", "job: Job | None = None)", "has_a_default"),
    "no level": ("plugin.py", "wnodes_api = 1", "wnodes_api = 7", "found_by_name_and_sound"),
    "raises in reply": ("plugin.py", "text = f", 'call.environ["MINE_JOB_ID"]\n    text = f', "every_verdict_has_a_reply"),
    "a user's word is a number": ("native.py", r"return VmRequest.parse\(text\) if text else None",
                                  "return VmRequest(cpus=int(text[-1])) if text else None", "whatever_is_in_a_call"),
    "believes a name": ("plugin.py", "process.uid == 0 and ", "", "nobody_forges"),
    "silent refusal": ("plugin.py", r'text = f"wnodes: \{error\}\\n" if error else ""', 'text = ""', "native_answer"),
    "a shell line": ("plugin.py", r'return \("mine", "list", node\)', 'return f"mine list {node}"', "queries_are_argv_lists"),
    "a heavy import": ("plugin.py", "import os\n", "import os\nimport asyncio\n", "loads_little"),
    "a heavy launcher": ("task.py", "from typing import", "import asyncio\nfrom typing import", "loads_little"),
    "loses the command": ("task.py", r"Task\(argv\[1:\]", "Task(argv[2:]", "the_command_is_the_one"),
    "drops live jobs' type": ("plugin.py", r"frozenset\(text.split\(\)\)", "set(text.split())", "live_jobs"),
}  # fmt: skip


def test_the_contract_sees_each_break(venv: Venv, tmp_path: Path) -> None:
    """One fresh adapter a break, all at once: a contract that nothing fails is none."""
    unseen = []
    for number, (what, (path, old, new, seen_by)) in enumerate(BREAKS.items()):
        folder = tmp_path / f"b{number}"
        scaffold.write("mine", "lrms", folder)
        broken = folder / "wnodes_mine" / path
        text = broken.read_text()
        changed = re.sub(old, lambda _, new=new: new, text, count=1)
        assert changed != text, what
        broken.write_text(changed)
        done = venv.run(
            venv.python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", seen_by, folder, check=False,
            cwd=folder, PYTHONPATH=str(folder),
        )  # fmt: skip
        if done.returncode != 1 or not re.search(f"FAILED .*{seen_by}", done.stdout):
            unseen.append(f"{what}: {done.stdout[-300:]}")
    assert not unseen, "\n".join(unseen)


def test_a_traced_call_names_the_plugin_and_its_time(venv: Venv, installed: Path) -> None:
    ask = (
        "from wnodes_core.plugins import Plugins; from wnodes_core.api import Job, VmRequest;"
        "Plugins(builtins=()).hook.wnodes_request_admit(request=VmRequest('el9', cpus=99), job=Job('a', '1', 'n', 1, 1, 'u'))"
    )
    said = venv.run(venv.python, "-c", ask, WNODES_TRACE="1").stderr
    assert re.fullmatch(r"wnodes: trace: wnodes_request_admit by chem: VmRequest\(.*cpus=8.*\) in \d+\.\d\d ms\n", said)


FAULTS = {
    "import": ("raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
    "level": ("wnodes_api = 2\n", "wnodes_api is 2: want one of (1,)"),
    "argument": ("from wnodes_core.api import hookimpl\nwnodes_api = 1\n@hookimpl\ndef wnodes_request_admit(wish): ...\n", "wish"),
    "hook": ("from wnodes_core.api import hookimpl\nwnodes_api = 1\n@hookimpl\ndef wnodes_request_admti(job): ...\n", "admti"),
    "default": (
        "from wnodes_core.api import hookimpl\nwnodes_api = 1\n@hookimpl\ndef wnodes_request_admit(job=None): ...\n",
        "job has a default, so it would never be passed",
    ),
}


def test_broken_packages_are_told_and_harm_nobody(venv: Venv, installed: Path, tmp_path: Path) -> None:
    for name, (source, _) in FAULTS.items():
        scaffold.write(f"bad{name}", "policy", tmp_path / name)
        (tmp_path / name / f"wnodes_bad{name}" / "plugin.py").write_text(source)
    venv.install(*(tmp_path / name for name in FAULTS))
    try:
        found = venv.plugins()
        assert venv.run(venv.folder / "bin" / "wnodes", "plugins", check=False).returncode == 1
        for name, (_, problem) in FAULTS.items():
            assert problem in found[f"bad{name}"]["problem"]
            assert found[f"bad{name}"]["origin"] == f"wnodes-bad{name} 0.1.0"
        assert found["chem"]["problem"] == "" and found["wnodes_core.images.disks"]["problem"] == ""
    finally:
        venv.uninstall(*(f"wnodes-bad{name}" for name in FAULTS))


@pytest.mark.parametrize("name", ["", "core", "Flux", "a-b", "../x", "x" * 40, "1a"])
def test_a_name_that_is_no_package_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="want a new word"):
        scaffold.write(name, "lrms", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    with pytest.raises(WnodesError, match="not there yet"):
        scaffold.write("flux", "lrms", tmp_path)
