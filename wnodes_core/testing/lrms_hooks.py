"""The adapter's functions: reading, replying, facts, owners. Called as the core calls them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from wnodes_core.api import Job, NativeCall, NativeReply, Owner, Phase, Process, VmRequest, errors
from wnodes_core.plugins import Plugins
from wnodes_core.testing import hostile
from wnodes_core.testing.calls import Call, Facts, Live
from wnodes_core.tools import read, spawn

_MAX_WORD = 128 << 10  # execve(2): MAX_ARG_STRLEN
_NOBODY = 65534


class Adapter:
    """An adapter as the core asks it: through pluggy, with every argument of the spec, by name."""

    def __init__(self, lrms: str, module: Any) -> None:
        self._module = module
        self._hook = Plugins(lrms=lrms, builtins=(), scan=False).hook

    def __getattr__(self, name: str) -> Any:
        """The hook, if this adapter implements it; arguments that a test does not give are None."""
        if not hasattr(self._module, name):
            raise AttributeError(name)
        caller = getattr(self._hook, name)
        return lambda **given: caller(**{argument: given.get(argument) for argument in caller.spec.argnames})


class LrmsHooks:
    """Part of LrmsContract."""

    calls: tuple[Call, ...]
    facts: tuple[Facts, ...]
    live: tuple[Live, ...]
    daemons: tuple[tuple[str, str], ...]
    lrms: str

    # reading

    def test_a_vm_jobs_call_is_read_as_captured(self, adapter: Adapter, vm_call: Call) -> None:
        if vm_call.refused:
            with pytest.raises(vm_call.refused):
                adapter.wnodes_lrms_read(call=vm_call.native())
            return
        read = adapter.wnodes_lrms_read(call=vm_call.native())
        assert read is not None, "an ordinary job?"
        request, job = read
        assert request == vm_call.asks
        if vm_call.job_id:
            assert (job.lrms, job.job_id) == (self.lrms, vm_call.job_id)

    def test_an_ordinary_jobs_call_without_script_is_read_as_none(self, adapter: Adapter, ordinary_call: Call) -> None:
        if not ordinary_call.script:
            assert adapter.wnodes_lrms_read(call=ordinary_call.native()) is None

    def test_reading_changes_nothing_and_may_be_repeated(self, adapter: Adapter, any_call: Call) -> None:
        frozen = any_call.native(environ=MappingProxyType(dict(any_call.environ)))
        before = dict(os.environ)
        assert _read(adapter, frozen) == _read(adapter, frozen)
        assert dict(os.environ) == before

    def test_whatever_is_in_a_call_reading_gives_a_request_none_or_an_error_of_ours(
        self, adapter: Adapter, any_call: Call
    ) -> None:
        for call in hostile.calls_like(any_call):
            read = _read(adapter, call)
            assert read is None or isinstance(read, type) or (isinstance(read[0], VmRequest) and _is_job(read[1])), call

    # replying

    def test_every_verdict_has_a_reply_and_none_raises(self, adapter: Adapter) -> None:
        for call in self._all_native():
            for error in _all_errors():
                for job in (None, Job(self.lrms, "7", "n0", 1000, 1000, "ann")):
                    reply = adapter.wnodes_lrms_reply(call=call, error=error, job=job)
                    _check_reply(reply)
                    assert reply == adapter.wnodes_lrms_reply(call=call, error=error, job=job), "a reply is pure"

    def test_what_users_wrote_never_changes_the_shape_of_a_reply(self, adapter: Adapter) -> None:
        for call in (call.native() for call in self.calls):
            for kind in (errors.BadRequest, errors.HostBusy, errors.StateDirFull):
                plain = _shape(adapter.wnodes_lrms_reply(call=call, error=kind("plain"), job=None))
                for text in (*hostile.NASTY, hostile.HUGE):
                    reply = adapter.wnodes_lrms_reply(call=call, error=kind(f"image {text!r} {text}"), job=None)
                    _check_reply(reply)
                    assert _shape(reply) == plain, text[:80]

    def test_success_is_no_refusal(self, adapter: Adapter) -> None:
        for call in self.calls:
            if not call.ordinary and not call.refused:
                reply = adapter.wnodes_lrms_reply(call=call.native(), error=None, job=None)
                assert (reply.exit_code, reply.commands) == (0, ()), call.name

    def _all_native(self) -> Iterator[NativeCall]:
        for call in self.calls:
            yield call.native()
        for phase in Phase:
            yield NativeCall(phase)
            yield NativeCall(phase, ("x", *hostile.NASTY), {"PATH": "", "\udcff": "\udcff"}, b"\0\xff" * 100)

    # facts and live jobs

    def test_queries_are_argv_lists(self, adapter: Adapter) -> None:
        job = Job(self.lrms, "7", "n0", 1000, 1000, "ann")
        for name, arguments in (
            ("wnodes_lrms_facts_query", {"job": job}),
            ("wnodes_lrms_live_query", {"node": "n0"}),
            ("wnodes_lrms_advertise_query", {"node": "n0"}),
        ):
            if hasattr(adapter, name):
                _check_argv(getattr(adapter, name)(**arguments))

    def test_facts_are_read_as_captured(self, adapter: Adapter) -> None:
        assert self.facts or not hasattr(adapter, "wnodes_lrms_facts_parse"), "want a captured text of the facts"
        for each in self.facts:
            told = adapter.wnodes_lrms_facts_parse(job=each.job, text=each.text)
            assert {name: getattr(told, name) for name in each.told} == dict(each.told)
            assert (told.lrms, told.job_id, told.uid) == (each.job.lrms, each.job.job_id, each.job.uid)

    def test_whatever_the_lrms_prints_facts_are_a_job_or_an_error_of_ours(self, adapter: Adapter) -> None:
        for each in self.facts:
            for text in hostile.texts_like(each.text):
                try:
                    told = adapter.wnodes_lrms_facts_parse(job=each.job, text=text)
                except errors.WnodesError:
                    continue
                assert told is None or isinstance(told, Job), text[:200]

    def test_live_jobs_are_read_as_captured(self, adapter: Adapter) -> None:
        assert self.live, "want a captured text of live jobs"
        for each in self.live:
            assert adapter.wnodes_lrms_live_parse(text=each.text) == each.jobs
            for text in hostile.texts_like(each.text):
                try:
                    assert isinstance(adapter.wnodes_lrms_live_parse(text=text), frozenset)
                except errors.WnodesError:
                    continue

    def test_capacity_is_published_by_argv_lists(self, adapter: Adapter) -> None:
        if hasattr(adapter, "wnodes_lrms_advertise"):
            capacity = {"images": ["el9", "deb.12"], "accel": "kvm", "leases": 1, "published": ""}
            for argv in adapter.wnodes_lrms_advertise(node="n0", capacity=capacity):
                _check_argv(argv)

    # owners

    def test_a_process_of_nobodys_has_no_owner(self, adapter: Adapter) -> None:
        me = read(os.getpid())
        assert me is not None
        for ancestry in ((), (me,), (Process(1, 0, 0, 1, "/sbin/init", ("init",)),), (Process(0, 0, 0, 0, "", ()),)):
            assert adapter.wnodes_lrms_owner(ancestry=ancestry) is None
        if hasattr(adapter, "wnodes_lrms_homes"):
            owner = Owner("7", "0", me, False, "n0")
            assert adapter.wnodes_lrms_homes(owner=owner, processes=[me]) is None

    def test_nobody_forges_the_lrmss_daemon(self, adapter: Adapter, public: Path) -> None:
        """A user may give a program of his own that name and that title; he is still not root."""
        assert self.daemons, "want name and title of the LRMS's daemon"
        uid = os.getuid() or _NOBODY
        for number, (name, title) in enumerate(self.daemons):
            program = public / str(number) / name
            program.parent.mkdir()
            shutil.copy(os.path.realpath("/bin/sleep"), program)
            program.chmod(0o755)
            child = spawn([sys.executable, "-I", "-c", _BECOME, str(uid), str(program), title], stdout=-1)
            try:
                assert child.stdout is not None and child.stdout.readline() == b"", child.stdout
                forged = read(child.pid)
                assert forged is not None and (forged.uid, forged.command[0]) == (uid, title), forged
                assert adapter.wnodes_lrms_owner(ancestry=[forged]) is None
            finally:
                child.kill()
                child.wait(10)
                child.stdout.close() if child.stdout else None


# Closes its stdout by exec (it is close-on-exec), which is how the test knows that the title stands.
_BECOME = """
import os, sys
uid, program, title = int(sys.argv[1]), sys.argv[2], sys.argv[3]
fd = os.open(program, os.O_RDONLY)
if os.getuid() == 0:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
os.set_inheritable(1, False)
os.execve(program, [title, "1000"], {})
"""


def _read(adapter: Adapter, call: NativeCall) -> Any:
    """What was read, or the kind of error of ours."""
    try:
        return adapter.wnodes_lrms_read(call=call)
    except errors.WnodesError as error:
        return type(error)


def _is_job(job: Any) -> bool:
    return job is None or isinstance(job, Job)


def _all_errors() -> Iterator[errors.WnodesError | None]:
    yield None
    kinds: list[type[errors.WnodesError]] = [errors.WnodesError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind is not errors.CommandError:  # callers translate it
            yield kind("what", hint="and why")


def _check_reply(reply: Any) -> None:
    assert isinstance(reply, NativeReply)
    assert 0 <= reply.exit_code <= 255 and isinstance(reply.stdout, str) and isinstance(reply.stderr, str)
    assert isinstance(reply.commands, tuple)
    for argv in reply.commands:
        _check_argv(argv)


def _check_argv(argv: Sequence[str]) -> None:
    assert not isinstance(argv, str) and argv, f"want an argv list, not {argv!r}"
    assert all(isinstance(word, str) and "\0" not in word for word in argv), argv
    assert all(len(word.encode(errors="replace")) < _MAX_WORD for word in argv), "execve takes no such word"
    assert argv[0] and not set(argv[0]) & set(" \t\n;|&$"), argv[0]


def _shape(reply: NativeReply) -> tuple[int, list[int], list[str]]:
    return reply.exit_code, [len(argv) for argv in reply.commands], [argv[0] for argv in reply.commands]
