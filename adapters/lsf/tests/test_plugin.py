"""The adapter's hooks, and the hook scripts themselves in a hostile environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wnodes_lsf import install, plugin

from wnodes_core.api import NativeCall, Owner, Phase, Process, VmRequest, errors

HOSTILE = {
    "PATH": "/nonexistent",
    "LD_PRELOAD": "/nonexistent/evil.so",
    "BASH_ENV": "/nonexistent/evil.sh",
    "ENV": "/nonexistent/evil.sh",
    "PYTHONPATH": "/nonexistent",
    "PYTHONHOME": "/nonexistent",
    "PYTHONSTARTUP": "/nonexistent/evil.py",
    "IFS": "w",
}


def call(folder: Path, phase: Phase = Phase.SUBMIT, parm: str = "", **environ: str) -> NativeCall:
    path = folder / "parm"
    path.write_text(parm, errors="surrogateescape")
    files = {"LSB_SUB_PARM_FILE": str(path), "LSB_SUB_MODIFY_FILE": str(folder / "modify")}
    files |= {"LSB_SUB_MODIFY_ENVFILE": str(folder / "envfile"), "LSB_SUB_ABORT_VALUE": "97"}
    return NativeCall(phase, ("-c", f"bsub={os.getpid()}", "queues=vm", "slots=yes", "--"), {**files, **environ})


def test_ordinary_submissions_are_not_ours(tmp_path):
    for parm in ("", 'LSB_SUB_ADDITIONAL="docker(x)"\n', 'LSB_SUB_JOB_NAME="wnodes(x)"\n'):
        assert plugin.wnodes_lrms_read(call(tmp_path, parm=parm)) is None
    assert plugin.wnodes_lrms_read(NativeCall(Phase.SUBMIT, ("-c", "--"), {})) is None


def test_a_vm_job_is_put_where_it_can_run(tmp_path):
    native_call = call(
        tmp_path, parm='LSB_SUB_ADDITIONAL="wnodes(el9)"\nLSB_SUB_RES_REQ="mem>5"\nLSB_SUB_NUM_PROCESSORS=2\n'
    )
    request, job = plugin.wnodes_lrms_read(native_call)
    assert (request, job) == (VmRequest("el9"), None)
    reply = plugin.wnodes_lrms_reply(native_call, None, None)
    files = dict(reply.files)
    assert files[str(tmp_path / "envfile")] == reply.stdout == 'WNODES_REQUEST="image=el9"\n'
    wanted = 'LSB_SUB_QUEUE="vm"\nLSB_SUB_RES_REQ="select[(mem>5) && vmslots>0] rusage[vmslots=1] span[hosts=1]"\n'
    assert files[str(tmp_path / "modify")] == wanted


def test_bmod_is_checked_and_changed_in_nothing(tmp_path):
    native_call = call(tmp_path, parm='LSB_SUB_ADDITIONAL="wnodes(el9)"\nLSB_SUB_MODIFY=Y\n', LSB_SUB_MODIFY_ENVFILE="")
    assert plugin.wnodes_lrms_read(native_call)
    assert plugin.wnodes_lrms_reply(native_call, None, None).files == ()


@pytest.mark.parametrize(
    "error", [None, errors.BadRequest("b"), errors.HostBusy("h"), errors.NoKvm("k"), errors.WnodesError("w")]
)
@pytest.mark.parametrize("phase", list(Phase))
def test_every_verdict_has_an_answer_in_lsf_s_terms(tmp_path, phase, error):
    reply = plugin.wnodes_lrms_reply(call(tmp_path, phase), error, None)
    if error is None or phase in (Phase.LAUNCH, Phase.FINISH, Phase.ADVERTISE):
        code = 0
    elif phase is Phase.SUBMIT:
        code = 97
    else:
        code = 99 if error.verdict is errors.Verdict.HOLD else 75
    assert reply.exit_code == code
    assert not error or str(error) in reply.stderr


def tree(*rows: tuple[int, str]) -> list[Process]:
    """Processes, nearest first, of (uid, exe)."""
    return [Process(900 - i, 899 - i, uid, 1, exe, ()) for i, (uid, exe) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "marks", "expected"),
    [
        ([(7, "/py"), (7, "/lsf/res"), (0, "/lsf/sbatchd"), (0, "/init")], {899: ["12"]}, ("12", 899)),
        # Before the job, sbatchd's own fork is the job's root: what it started tells which job.
        ([(7, "/py"), (7, "/bin/sh"), (7, "/lsf/sbatchd"), (0, "/lsf/sbatchd")], {899: ["12"]}, ("12", 898)),
        # A user below the job cannot say otherwise.
        (
            [(7, "/py"), (7, "/sh"), (7, "/lsf/res"), (0, "/lsf/sbatchd")],
            {898: ["12"], 899: ["13"], 900: ["14"]},
            ("12", 898),
        ),
        ([(7, "/py"), (7, "/lsf/res"), (0, "/lsf/sbatchd")], {899: ["12", "13"]}, None),  # written by hand
        ([(7, "/py"), (7, "/lsf/sbatchd"), (1, "/init")], {900: ["12"]}, None),  # no sbatchd of root's
        ([(7, "/py"), (0, "/usr/sbin/sshd")], {900: ["12"]}, None),
        ([(0, "/lsf/sbatchd")], {900: ["12"]}, None),
    ],
)
def test_the_job_is_told_from_the_tree_below_root_s_sbatchd(monkeypatch, rows, marks, expected):
    chain = tree(*rows)
    monkeypatch.setattr(plugin, "_is_sbatchd", lambda p: p.uid == 0 and p.exe.endswith("/sbatchd"))
    monkeypatch.setattr(plugin, "environ_of", lambda p, name: marks.get(p.pid, []) if name == "LSB_JOBID" else [])
    owner = plugin.wnodes_lrms_owner(chain)
    assert (owner and (owner.job_id, owner.root.pid)) == expected


def test_only_root_s_own_program_of_that_name_is_sbatchd():
    me = Process(os.getpid(), 1, os.getuid(), 1, "/x/sbatchd", ())
    assert plugin._is_sbatchd(me) == (os.getuid() == 0)
    assert not plugin._is_sbatchd(Process(os.getpid(), 1, 0, 1, "/x/python3", ()))
    assert not plugin._is_sbatchd(Process(1 << 22, 1, 0, 1, "/x/sbatchd", ()))


def test_the_queries_name_the_job_and_the_node_as_arguments():
    owner = Owner("12_3", "job", Process(1, 0, 0, 1, "", ()), True, "n0", "/home/x")
    job = plugin.wnodes_lrms_claim(owner, 0, 0)
    assert (job.job_id, job.node, job.user, job.work_dir) == ("12_3", "n0", "root", "/home/x")
    assert plugin.wnodes_lrms_claim(owner, 4242424, 0) is None
    assert plugin.wnodes_lrms_facts_query(job)[-1] == "12[3]"
    assert plugin.wnodes_lrms_live_query("n0")[-1] == "n0"
    assert plugin.wnodes_lrms_live_parse("12 0\n") == frozenset({"12"})


@pytest.fixture
def hooks(folder):
    """Our scripts as installed, for a wnodesd that is not there, with a Python that tells if it was started."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho started >> {folder}/started\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "lsb.queues").touch()
    site = install.Site(
        folder / "etc", folder / "lsb.queues", folder / "lib", folder / "run", str(python), generic=True
    )
    for step in install.plan(site):
        step.apply()
    yield folder
    shutil.rmtree(folder / "etc")


def run(script: Path, stdin: bytes | None = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
    """As LSF runs it, as an ordinary user; without stdin it is closed."""
    how = {"input": stdin} if stdin is not None else {"preexec_fn": lambda: os.close(0)}
    return subprocess.run(
        [script], env={**HOSTILE, **environ}, capture_output=True, timeout=20, user=65534, group=65534, **how
    )


@pytest.mark.parametrize(
    "stdin", [b"", b"other data\0", b"x" * 100000 + b"\n", None], ids=["none", "other", "long", "closed"]
)
@pytest.mark.parametrize("when", ["START", "END", "CHKPNT", ""])
def test_eexec_is_silent_and_starts_no_python_for_other_jobs(hooks, when, stdin):
    done = run(hooks / "etc/eexec", stdin, LS_EXEC_T=when, LSB_QUEUE="normal", LS_JOBPID="1")
    assert (done.returncode, done.stdout) == (0, b"")
    assert not (hooks / "started").exists()


def test_esub_is_silent_and_starts_no_python_for_other_jobs(hooks):
    parm = hooks / "parm"
    parm.write_bytes(b'LSB_SUB_JOB_NAME="wnodes(x)"\nLSB_SUB_ADDITIONAL="docker(x)"\n' + b"\xff\0" * 100000)
    for name in ("esub", "esub.wnodes"):
        done = run(hooks / "etc" / name, LSB_SUB_PARM_FILE=str(parm), LSB_SUB_ABORT_VALUE="97")
        assert (done.returncode, done.stdout) == (0, b"")
        assert run(hooks / "etc" / name).returncode == 0  # lsrun has no parameter file
    assert not (hooks / "started").exists()


@pytest.mark.parametrize(
    "words",
    [
        b"wnodes(imge=x)",
        b"wnodes(image=\xff\xfe)",
        b"wnodes(" + b"a" * (1 << 20) + b"=1)",
        b'wnodes(image="; $(id)`id`)',
    ],
)
def test_esub_refuses_a_bad_request_with_the_abort_value_and_one_clear_line(hooks, words):
    (hooks / "parm").write_bytes(b'LSB_SUB_ADDITIONAL="' + words + b'"\n')
    done = run(hooks / "etc/esub.wnodes", LSB_SUB_PARM_FILE=str(hooks / "parm"), LSB_SUB_ABORT_VALUE="97")
    assert done.returncode == 97 and b"wnodes: " in done.stderr and len(done.stderr) < 3000, done


def test_esub_carries_the_request_to_environment_and_eexec_and_executes_none_of_it(hooks):
    hooks.chmod(0o777)
    (hooks / "parm").write_text(
        f'LSB_SUB_JOB_NAME="$(touch {hooks}/evil)`touch {hooks}/evil`"\nLSB_SUB_ADDITIONAL="wnodes(el9)"\n'
    )
    where = {name: str(hooks / name) for name in ("LSB_SUB_MODIFY_FILE", "LSB_SUB_MODIFY_ENVFILE")}
    done = run(hooks / "etc/esub", LSB_SUB_PARM_FILE=str(hooks / "parm"), LSB_SUB_ABORT_VALUE="97", **where)
    assert (done.returncode, done.stdout) == (0, b'WNODES_REQUEST="image=el9"\n'), done
    assert (hooks / "LSB_SUB_MODIFY_ENVFILE").read_bytes() == done.stdout
    assert not (hooks / "evil").exists()


def test_a_site_s_own_eexec_and_esub_go_on_with_their_own_data(folder):
    (folder / "etc").mkdir()
    for name in ("eexec", "esub"):
        (folder / "etc" / name).write_text(f"#!/bin/sh\n/bin/cat >> {folder}/{name}.seen\n")
        (folder / "etc" / name).chmod(0o755)
        (folder / f"{name}.seen").touch()
        (folder / f"{name}.seen").chmod(0o666)
    (folder / "lsb.queues").touch()
    site = install.Site(folder / "etc", folder / "lsb.queues", folder / "lib", folder / "run", generic=True)
    for step in install.plan(site):
        step.apply()
        step.apply()  # ours is not taken for the site's
    run(folder / "etc/eexec", b"site\0data", LS_EXEC_T="START")
    run(folder / "etc/eexec", b"more", LS_EXEC_T="START", WNODES_REQUEST="image=a", LSB_QUEUE="vm")
    assert (folder / "eexec.seen").read_bytes() == b"site\0datamore"
    run(folder / "etc/esub", b"once")
    assert (folder / "esub.seen").read_bytes() == b"once"


@pytest.mark.parametrize("name", ["pre_exec", "post_exec", "launch"])
def test_without_wnodesd_each_hook_says_no_in_its_own_way(hooks, name):
    done = run(hooks / "lib" / name, WNODES_REQUEST="image=el9")
    assert done.returncode == {"pre_exec": 1, "post_exec": 0, "launch": 125}[name], done


def test_pre_exec_never_lets_a_malformed_request_go_round(hooks):
    done = run(hooks / "lib/pre_exec", WNODES_REQUEST="imge=x")
    assert done.returncode == 99 and b"did you mean image=?" in done.stderr


def test_elim_prints_one_line_and_zero_slots_without_wnodesd(hooks):
    process = subprocess.Popen(
        [hooks / "etc/elim.wnodes"],
        env=HOSTILE | {"PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None and process.stdout.readline() == b"1 vmslots 0\n"
    process.terminate()
    assert process.wait(5) == 0
    process.stdout.close()
