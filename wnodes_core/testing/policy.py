"""What every policy plug-in must do, as tests that its author inherits.

::

    class TestChem(PolicyContract):
        plugin = "wnodes_chem.plugin"
        allowed = ((VmRequest(image="el9"), job),)
        refused = ((VmRequest(image="licensed"), job),)
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from wnodes_core.api import Job, VmRequest, errors
from wnodes_core.plugins import Plugins
from wnodes_core.testing.hostile import NASTY


class PolicyContract:
    """Agree or refuse, the same each time, and break over no job."""

    plugin = ""
    allowed: tuple[tuple[VmRequest, Job], ...] = ()
    refused: tuple[tuple[VmRequest, Job], ...] = ()

    @pytest.fixture
    def admit(self) -> Any:
        """The hook with this plug-in alone: a list of answers that are not None."""
        plugins = Plugins(builtins=(), scan=False)
        plugins.register(importlib.import_module(self.plugin), "contract")
        assert plugins.found[-1].problem == ""
        return plugins.hook.wnodes_request_admit

    def test_what_is_allowed_comes_back_as_a_request(self, admit: Any) -> None:
        assert self.allowed, "want a request that is allowed"
        for request, job in self.allowed:
            answers = admit(request=request, job=job)
            assert all(isinstance(answer, VmRequest) for answer in answers)
            assert answers == admit(request=request, job=job)
            again = answers[0] if answers else request
            assert all(answer == again for answer in admit(request=again, job=job)), "its own answer is fine with it"

    def test_what_is_refused_says_value_and_wish(self, admit: Any) -> None:
        assert self.refused, "want a request that is refused"
        for request, job in self.refused:
            with pytest.raises(errors.RequestError) as caught:
                admit(request=request, job=job)
            assert "want" in str(caught.value), f"say what is wanted: {caught.value}"

    def test_no_job_breaks_it(self, admit: Any) -> None:
        for text in NASTY:
            job = Job("slurm", "7", "n0", 1000, 1000, text, queue=text, account=text, work_dir=text)
            for request in (VmRequest(), VmRequest(image="el9", network=text), *(each for each, _ in self.allowed)):
                try:
                    answers = admit(request=request, job=job)
                except errors.RequestError:
                    continue
                assert all(isinstance(answer, VmRequest) for answer in answers), text
