"""Parsers of the adapter: what is written by users is text, whatever it holds."""

from __future__ import annotations

import base64
import doctest
import json
import shlex
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wnodes_lsf import elim, native, task

from wnodes_core.api import Job, VmRequest, errors

JOB = Job("lsf", "12", "n0", 1000, 1000, "ann")
NAMES = st.text(string.ascii_uppercase, min_size=1, max_size=12)


@pytest.mark.parametrize("module", [native, task, elim])
def test_the_samples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


@given(
    st.dictionaries(NAMES, st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"])), max_size=6)
)
def test_values_come_back_as_they_were_written_however_raw(options):
    text = "".join(f'LSB_SUB_{name}="{value}"\n' for name, value in options.items())
    assert native.parse_parameters(text) == options


@given(st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape")))
def test_no_text_breaks_the_parsers(text):
    assert isinstance(native.parse_parameters(text), dict)
    for parse in (native.request_text, native.parse_request, native.live_of):
        try:
            parse(text)
        except errors.WnodesError as error:
            assert len(str(error)) < 1200
    with pytest.raises(errors.WnodesError):
        native.confirmed(JOB, text)
    assert isinstance(native.hosts_of(text), dict)
    assert native.resources(text, True, True) is not None
    assert elim.report(text, ["a"], lambda pid, started: True).startswith("3 vmslots ")


def test_a_megabyte_is_parsed_in_a_moment_and_shown_in_a_line():
    big = "x" * (1 << 20)
    assert native.parse_parameters(f'LSB_SUB_JOB_NAME="{big}"\nLSB_SUB_QUEUE="vm"\n') == {
        "JOB_NAME": big,
        "QUEUE": "vm",
    }
    with pytest.raises(errors.BadRequest) as raised:
        native.parse_request("image=" + big + "$")
    assert len(str(raised.value)) < 400
    assert native.request_text("(" * 100000 + "wnodes" + " x(" * 100000) is None
    with pytest.raises(errors.BadRequest):
        native.request_text("wnodes(" + "(" * (1 << 20))


REQUESTS = st.builds(
    VmRequest,
    image=st.sampled_from(["", "el9", "el9:2.1"]),
    cpus=st.none() | st.integers(1, 99),
    memory_mib=st.none() | st.integers(1, 99999),
    start=st.sampled_from(["", "cold"]),
)


@given(REQUESTS)
def test_a_request_survives_its_way_through_lsf(request_):
    text = request_.text()
    assert native.parse_request(text) == request_
    if text:
        assert native.request_text(f"other wnodes({text}) last(x)") == text


@pytest.mark.parametrize("sign", list("\"`$\\\n\0'(){};&|<>*?[]!#^é"))
def test_signs_that_lsf_cannot_carry_are_refused(sign):
    with pytest.raises(errors.BadRequest):
        native.parse_request(f"image=a,mount=/x{sign}")


PLAIN = st.text(st.characters(blacklist_characters="\0\n\r", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(PLAIN, min_size=1, max_size=5))
def test_a_command_with_single_quotes_becomes_base64_and_the_same_again(words):
    command = " ".join(words)
    new = native.rewritten(command, ["bsub", "-q", "vm", *words])
    assert bool(new) == ("'" in command)
    if new:
        assert "'" not in new and task.read_task(("launch", new), {}).argv == ("/bin/sh", "-c", command)
    quoted = shlex.join(words)  # as some releases show it
    again = native.rewritten(quoted, ["bsub", *words])
    assert not again or base64.b64decode(again.split()[1]).decode() == quoted


def test_a_script_from_stdin_is_left_alone_and_an_unknown_command_refused():
    flat = "#!/bin/sh;echo 'x'"
    assert native.rewritten(flat, ["bsub", "-q", "vm"]) == ""
    with pytest.raises(errors.BadRequest, match="LSB_SUB_COMMANDNAME|single quote"):
        native.rewritten(None, ["bsub", "echo 'x'"])
    assert native.rewritten(None, ["bsub", "echo x"]) == ""


def record(**changes):
    told = {"JOBID": "12", "STAT": "RUN", "USER": "ann", "QUEUE": "vm", "EXEC_HOST": "4*n0.example.org", **changes}
    return json.dumps({"COMMAND": "bjobs", "JOBS": 1, "RECORDS": [told]})


def test_bjobs_confirms_the_job_with_its_cpus_and_queue():
    job = native.confirmed(JOB, record())
    assert (job.cpus, job.queue, job.uid) == (4, "vm", 1000)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"STAT": "PEND", "EXEC_HOST": ""}, errors.TransientError),
        ({"STAT": "EXIT"}, errors.TransientError),
        ({"EXEC_HOST": "other"}, errors.TransientError),
        ({"JOBID": "13"}, errors.TransientError),
        ({"USER": "bob"}, errors.RequestError),
        ({"USER": None}, errors.RequestError),
    ],
)
def test_bjobs_does_not_confirm_what_is_not_the_users_running_here(changes, kind):
    with pytest.raises(kind):
        native.confirmed(JOB, record(**changes))


@given(st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_a_job_key_is_safe_in_a_file_name_or_none(ids, indices):
    key = native.key_of(ids, indices)
    assert key is None or set(key) <= set(string.digits + "_")
    if key:
        number, _, index = key.partition("_")
        assert native.spec_of(key) == (f"{number}[{index}]" if index else number)


@pytest.mark.parametrize("text", ["a; b", "x 'y'", "--b64 !!", "$(id)", "", "-n"])
def test_the_launcher_runs_one_argument_and_only_one(text):
    if text.startswith("--b64"):
        with pytest.raises(errors.BadRequest):
            task.read_task(("launch", text), {})
    else:
        assert task.read_task(("launch", text), {}).argv == ("/bin/sh", "-c", text)
    with pytest.raises(errors.BadRequest, match="JOB_STARTER = exec launch '%USRCMD'"):
        task.read_task(("launch", text, "more"), {})


def test_a_spooled_script_is_found_and_a_missing_one_refused(tmp_path):
    path = tmp_path / "1.12.shell"
    environ = {"LSB_JOBFILENAME": str(path)[:-6], "WNODES_REQUEST": "image=a"}
    with pytest.raises(errors.BadRequest, match="No such file"):
        task.read_task(("launch", task.SCRIPT), environ)
    path.write_text("#!/usr/bin/python3\n")
    found = task.read_task(("launch", task.SCRIPT), environ)
    assert (found.argv, found.carried, found.request) == ((str(path),), (str(path),), "image=a")
    path.write_text("echo plain\n")
    assert task.read_task(("launch", str(path)), environ).argv == ("/bin/sh", str(path))
