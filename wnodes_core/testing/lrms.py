"""What every LRMS adapter must do, as tests that its author inherits.

::

    class TestMine(LrmsContract):
        lrms = "mine"                      # the package is wnodes_mine
        scripts = Path("hooks")            # the scripts that the LRMS starts, with @PYTHON@ and @RUN@ in them
        calls = (Call("prolog", Phase.PREPARE, "prolog", environ={…}, asks=VmRequest(image="el9"), answers={…}), …)
        facts = (Facts(job, "captured text", {"cpus": 4}),)
        live = (Live("12\\n13\\n", frozenset({"12", "13"})),)
        tasks = (TaskCall(("launch", "--", "/bin/echo"), {}, means=("/bin/echo",)),)
        daemons = (("mined", "mined: job 12"),)

        def launch(self, line):            # how the LRMS starts the launcher for a shell line
            return Call("task", Phase.LAUNCH, "launch", argv=("--", "/bin/sh", "-c", line))

``elsewhere`` names scripts that are no hooks of a job, and which test runs them.
``calls`` are captured from the real thing; among them at least one of an ordinary job and one that is
refused. No test here knows an LRMS: what differs between them stands in the calls and their answers.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from wnodes_core import hookspecs
from wnodes_core.api import Phase
from wnodes_core.plugins import Plugins
from wnodes_core.testing.calls import Call, Facts, Live, Outcome, TaskCall
from wnodes_core.testing.lrms_hooks import Adapter, LrmsHooks
from wnodes_core.testing.lrms_scripts import LrmsScripts
from wnodes_core.testing.lrms_task import LrmsTask
from wnodes_core.testing.stage import Stage

NEEDED = tuple(f"wnodes_lrms_{verb}" for verb in ("read", "reply", "owner", "live_query", "live_parse"))
PAIRS = (
    ("wnodes_lrms_facts_query", "wnodes_lrms_facts_parse"),
    ("wnodes_lrms_live_query", "wnodes_lrms_live_parse"),
)


class LrmsContract(LrmsHooks, LrmsScripts, LrmsTask):
    """Reading, replying, hook scripts, launcher. See the module for what to set."""

    lrms = ""
    scripts: Path | None = None
    marks: Mapping[str, str] = {}
    calls: tuple[Call, ...] = ()
    facts: tuple[Facts, ...] = ()
    live: tuple[Live, ...] = ()
    tasks: tuple[TaskCall, ...] = ()
    daemons: tuple[tuple[str, str], ...] = ()
    refused_code = 125
    elsewhere: Mapping[str, str] = {}

    def launch(self, line: str) -> Call:
        """How the LRMS starts the launcher for the shell line ``line``, in a job that asked for a VM."""
        raise NotImplementedError("say how the LRMS starts the launcher")

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test a call, and one a call and outcome."""
        calls = self.calls
        scripted = [call for call in calls if call.script]
        if "vm_call" in metafunc.fixturenames:
            self._each(metafunc, "vm_call", [c for c in calls if not c.ordinary])
        if "ordinary_call" in metafunc.fixturenames:
            self._each(metafunc, "ordinary_call", [c for c in calls if c.ordinary])
        if "any_call" in metafunc.fixturenames:
            self._each(metafunc, "any_call", calls)
        if "scripted_call" in metafunc.fixturenames:
            self._each(metafunc, "scripted_call", [c for c in scripted if not c.ordinary])
        if "case" in metafunc.fixturenames:
            cases = [(call, outcome) for call in scripted if not call.ordinary for outcome in call.outcomes]
            metafunc.parametrize("case", cases, ids=[f"{call.name}-{outcome}" for call, outcome in cases])
        if "refusal" in metafunc.fixturenames:
            metafunc.parametrize("refusal", [o for o in Outcome if o is not Outcome.GRANTED], ids=str)

    @staticmethod
    def _each(metafunc: Any, name: str, calls: Any) -> None:
        metafunc.parametrize(name, calls, ids=[call.name for call in calls])

    @pytest.fixture
    def module(self) -> Any:
        """The adapter's plug-in."""
        return importlib.import_module(f"wnodes_{self.lrms}.plugin")

    @pytest.fixture
    def adapter(self, module: Any) -> Adapter:
        """The adapter as the core asks it."""
        return Adapter(self.lrms, module)

    @pytest.fixture
    def public(self) -> Iterator[Path]:
        """A folder that other users can walk into: pytest's own is private."""
        folder = Path(tempfile.mkdtemp(prefix="wnodes-contract-", dir="/var/tmp"))
        folder.chmod(0o755)
        yield folder
        shutil.rmtree(folder)

    @pytest.fixture
    def stage(self, public: Path) -> Stage:
        """The adapter's scripts, installed."""
        package = importlib.import_module(f"wnodes_{self.lrms}")
        scripts = self.scripts or Path(str(package.__file__)).parent / "hooks"
        return Stage(public / "stage", scripts, f"wnodes_{self.lrms}", self.marks)

    # what is declared

    def test_the_calls_cover_the_contract(self) -> None:
        assert len({call.name for call in self.calls}) == len(self.calls), "two calls have one name"
        assert any(call.ordinary for call in self.calls), "want a call of an ordinary job"
        assert any(call.refused for call in self.calls), "want a call whose option is malformed"
        phases = {call.phase for call in self.calls if call.asks is not None}
        assert phases & {Phase.SUBMIT, Phase.PREPARE}, "want a call of a VM job before its launch"
        assert self.tasks, "want a start of the launcher"
        for call in self.calls:
            if call.script:
                missing = set(call.outcomes) - set(call.answers) - ({Outcome.GRANTED} if call.ordinary else set())
                assert not missing, f"{call.name}: want the answers for {', '.join(sorted(missing))}"

    def test_every_script_is_called(self) -> None:
        package = importlib.import_module(f"wnodes_{self.lrms}")
        scripts = self.scripts or Path(str(package.__file__)).parent / "hooks"
        there = {path.name for path in scripts.iterdir() if path.is_file() and not path.suffix}
        called = set(self.elsewhere) | {call.script for call in self.calls} | {self.launch("true").script}
        assert there <= called, f"no call of {', '.join(sorted(there - called))}"

    # the plug-in

    def test_it_is_found_by_name_and_sound(self) -> None:
        found = {one.name: one for one in Plugins(lrms=self.lrms, builtins=(), scan=False).found}
        assert found[self.lrms].problem == ""

    def test_the_needed_hooks_are_there_and_queries_have_their_parsers(self, adapter: Adapter) -> None:
        assert not [name for name in NEEDED if not hasattr(adapter, name)]
        for query, parse in PAIRS:
            assert hasattr(adapter, query) == hasattr(adapter, parse), f"{query} without {parse}, or the reverse"
        if hasattr(adapter, "wnodes_lrms_advertise_query"):
            assert hasattr(adapter, "wnodes_lrms_advertise"), "an advertise_query that nobody reads"

    def test_no_parameter_of_a_hook_has_a_default(self, module: Any) -> None:
        specs = {name: f for specs in hookspecs.ALL for name, f in vars(specs).items() if name.startswith("wnodes_")}
        for name, function in vars(module).items():
            if name.startswith("wnodes_lrms_"):
                assert name in specs, f"{name}: no such hook"
                ours = inspect.signature(function).parameters
                assert set(ours) <= set(inspect.signature(specs[name]).parameters), name
                wrong = [p.name for p in ours.values() if p.default is not p.empty]
                assert not wrong, f"{name}: {wrong} has a default, so pluggy would never pass it"
