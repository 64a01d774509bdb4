"""The simulator keeps the contract, from submission to the node: each test names the row that it holds, with its mark.

D: IBM's documents of 10.1. T: observed on a GPL descendant of LSF 4.2. M: from memory.
"""

from __future__ import annotations

import os

import pytest
from lsf_recorder import Recorder
from wnodes_lsf.testing import USER, until

pytestmark = pytest.mark.lsf


def test_order_of_hooks_users_folders_and_streams(cluster: Recorder) -> None:
    """T: eexec START, queue PRE, job PRE, job, eexec END, job POST, queue POST; as the user, in /tmp."""
    hook = f"{cluster.folder}/hook"
    job = cluster.bsub("-q", "hooked", "-E", f"{hook} job-pre", "-Ep", f"{hook} job-post", f"{hook} job")
    cluster.ended(job)
    until(lambda: "queue-post" in cluster.names(), lambda: str(cluster.names()))
    assert cluster.names() == ["START", "queue-pre", "job-pre", "job", "END", "job-post", "queue-post"]
    calls = cluster.calls()
    assert {call["uid"] for call in calls} == {int(os.stat(cluster.work).st_uid)}
    assert {call["cwd"] for call in calls if call["name"] != "job"} == {"/tmp"}
    assert all(call["stdio"] == ["/dev/null"] * 2 for call in calls if call["name"] != "job")
    pre = cluster.calls("queue-pre")[0]["environ"]
    assert pre["PATH"] == "/bin:/usr/bin:/sbin:/usr/sbin"  # D/T: PRE and POST; the rest is the job's
    start, end = cluster.calls("eexec")
    assert start["group"] != int(start["environ"]["LS_JOBPID"])  # own process group
    assert start["environ"]["LS_JOBPID"] != end["environ"]["LS_JOBPID"]  # the caller's: not the same at END


def test_sbatchd_overwrites_forged_variables_and_passes_the_others(cluster: Recorder) -> None:
    """T: LSB_JOBID, LSB_JOBINDEX, LSB_QUEUE … are set after the user's environment; other LSB_* and WN_* pass."""
    forged = {
        "LSB_JOBID": "1",
        "LSB_JOBINDEX": "9",
        "LSB_QUEUE": "x",
        "LSB_OTHER": "mine",
        "WN_X": "mine",
        "LS_JOBPID": "1",
    }
    job = cluster.bsub("true", environ=forged)
    cluster.ended(job)
    environ = cluster.calls("eexec")[0]["environ"]
    assert (environ["LSB_JOBID"], environ["LSB_JOBINDEX"], environ["LSB_QUEUE"]) == (job, "0", "normal")
    assert environ["LSB_OTHER"] == environ["WN_X"] == "mine" and environ["LS_JOBPID"] != "1"


def test_the_process_tree_is_sbatchd_res_job_file(cluster: Recorder) -> None:
    """T: sbatchd -> res (LS_JOBPID, leader of its group, the user's) -> sh -> the job."""
    cluster.program(
        cluster.work / "tell", "#!/bin/sh\necho $LS_JOBPID $PPID $(cut -d' ' -f4,5 /proc/$PPID/stat); sleep 1\n"
    )
    job = cluster.bsub(f"{cluster.work}/tell; true")
    res, shell, parent, group = map(int, until(lambda: cluster.output(job), "output").split())
    assert parent == group == res and shell != res
    assert os.readlink(f"/proc/{res}/exe") == f"{cluster.serverdir}/res"
    assert os.stat(f"/proc/{res}").st_uid == os.stat(cluster.work).st_uid
    with open(f"/proc/{res}/stat") as file:
        assert int(file.read().split()[3]) == cluster.daemons["sbatchd"]
    cluster.ended(job)


@pytest.mark.parametrize(
    ("queue", "command", "printed"),
    [
        ("normal", "echo a; echo b", ["a", "b"]),
        ("prefix", "a; echo on-the-host", ["starter[1]:a", "on-the-host"]),  # T: wraps only the first simple command
        (
            "double",
            'a"; echo on-the-host; echo "',
            ["starter[1]:a", "on-the-host", ""],
        ),  # T: the user leaves the quotes
        ("quoted", 'a; b | "c" $HOME', ['starter[1]:a; b | "c" $HOME']),  # T: one argument
    ],
)
def test_usrcmd_is_pasted_as_text(cluster: Recorder, queue: str, command: str, printed: list[str]) -> None:
    job = cluster.bsub("-q", queue, command)
    cluster.ended(job)
    assert cluster.output(job).splitlines() == printed


def test_a_script_arrives_as_the_literal_path_of_its_spool_file(cluster: Recorder) -> None:
    """T: ``$LSB_JOBFILENAME.shell``, not expanded between single quotes; without a starter it runs."""
    job = cluster.bsub("-q", "quoted", stdin=b"echo script\n")
    plain = cluster.bsub(stdin=b"#!/bin/sh\n#BSUB -J named\necho $LSB_JOBNAME $0\n")
    cluster.ended(job), cluster.ended(plain)
    assert cluster.output(job) == "starter[1]:$LSB_JOBFILENAME.shell\n"
    name, path = cluster.output(plain).split()
    assert name == "named" and path.endswith(f".{plain}.shell") and "/.lsbatch/" in path


def esubs(cluster: Recorder, **bodies: str) -> None:
    for name, body in bodies.items():
        path = cluster.serverdir / name.replace("__", ".")
        cluster.program(path, f'#!/bin/sh\n{cluster.folder}/hook {path.name} "$@" </dev/null >/dev/null 2>&1\n{body}\n')


def test_esubs_run_in_order_as_the_user_below_bsub(cluster: Recorder) -> None:
    """T (and D of 10.1): esub, LSB_ESUB_METHOD, then -a; the environment replaces the method; no arguments: "-r"."""
    esubs(cluster, esub="", esub__site="", esub__a="", esub__mine="")
    conf = cluster.envdir / "lsf.conf"
    conf.write_text(conf.read_text() + 'LSB_ESUB_METHOD="site"\n')
    cluster.bsub("-a", "a a(x=1) missing", "true")
    cluster.bsub("-a", "a", "true", environ={"LSB_ESUB_METHOD": "mine"})
    cluster.bsub("true", environ={"LSB_ESUB_METHOD": ""})
    calls = [call for call in cluster.calls() if call["name"].startswith("esub")]
    assert [call["name"] for call in calls] == ["esub", "esub.site", "esub.a", "esub", "esub.mine", "esub.a", "esub"]
    assert calls[2]["argv"] == ["-r"] and {call["cwd"] for call in calls} == {str(cluster.work)}
    assert 'LSB_SUB_ADDITIONAL="a a(x=1) missing"\n' in calls[2]["parm"]  # the raw text is seen


@pytest.mark.parametrize("cluster", ["D"], indirect=True)
def test_ten_one_passes_arguments_and_refuses_a_missing_method(cluster: Recorder) -> None:
    """D: ``name(args)``; M: they are the positional arguments."""
    esubs(cluster, esub__a="")
    cluster.bsub("-a", "a(x=1,y=2)", "-app", "p", "true")
    (call,) = cluster.calls("esub.a")
    assert (
        call["argv"] == ["x=1", "y=2"]
        and 'LSB_SUB3_APP="p"\n' in call["parm"]
        and call["environ"]["LSF_INVOKE_CMD"] == "bsub"
    )
    done = cluster.run_as(USER, ["bsub", "-a", "none", "true"], check=False)
    assert done.exit_code == 255


def test_the_parameter_file_escapes_nothing(cluster: Recorder) -> None:
    """D/T: ``NAME="value"``, only options given; booleans Y, numbers bare; quotes, backticks and dollars raw."""
    esubs(cluster, esub="")
    cluster.bsub("-J", 'a"b`c`$(d)', "-n", "2", "-H", "-q", "normal", "echo \"x\" 'y'")
    parm = cluster.calls("esub")[0]["parm"].splitlines()
    assert 'LSB_SUB_JOB_NAME="a"b`c`$(d)"' in parm and "LSB_SUB_NUM_PROCESSORS=2" in parm and "LSB_SUB_HOLD=Y" in parm
    assert """LSB_SUB_COMMAND_LINE="echo "x" 'y'\"""" in parm
    assert not [line for line in parm if line.startswith("LSB_SUB_RES_REQ")]


def test_what_an_esub_may_change(cluster: Recorder) -> None:
    """D/T: options and even the command line; not ADDITIONAL; a bad line is a warning; the environment by ENVFILE."""
    change = """\
printf 'LSB_SUB_QUEUE="hooked"\\nLSB_SUB_COMMAND_LINE="echo $ADDED"\\n' >"$LSB_SUB_MODIFY_FILE"
printf 'LSB_SUB_JOB_NAME=bad\\nLSB_SUB_FOO="x"\\n' >>"$LSB_SUB_MODIFY_FILE"
printf 'ADDED="by esub"\\n' >"$LSB_SUB_MODIFY_ENVFILE\""""
    esubs(cluster, esub=change)
    job = cluster.bsub("echo typed")
    assert cluster.ended(job)["queue"] == "hooked"
    assert cluster.output(job) == "by esub\n"


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("exit $LSB_SUB_ABORT_VALUE", True),
        ("kill -9 $$", True),
        ("exit 1", False),
        ("exit 96", False),
        ("exit 0", False),
    ],
)
def test_only_the_abort_value_or_a_signal_refuses(cluster: Recorder, body: str, refused: bool) -> None:
    """D/T: every other exit code is ignored and the job accepted."""
    esubs(cluster, esub=f"echo said >&2; {body}")
    done = cluster.run_as(USER, ["bsub", "true"], check=False)
    assert done.exit_code == (255 if refused else 0) and b"said" in done.stderr


def test_esub_s_output_reaches_eexec_whole_at_start_and_end(cluster: Recorder) -> None:
    """T: a megabyte with NUL bytes passes; of several esubs the last that wrote wins."""
    esubs(cluster, esub="echo lost", esub__big="head -c 1000000 /dev/zero", esub__silent="")
    job = cluster.bsub("-a", "big silent", "true")
    cluster.ended(job)
    until(lambda: len(cluster.calls("eexec")) == 2, lambda: str(cluster.names()))
    assert [(call["size"], call["head"]) for call in cluster.calls("eexec")] == [(1000000, "00" * 20)] * 2


def test_bmod_runs_esubs_without_an_environment_file(cluster: Recorder) -> None:
    """D: LSF_INVOKE_CMD names the caller, no MODIFY_ENVFILE; T: the command line holds the job's id."""
    esubs(cluster, esub="")
    job = cluster.bsub("-H", "true")
    cluster.run_as(USER, ["bmod", "-q", "hooked", job])
    call = cluster.calls("esub")[1]
    assert call["environ"]["LSF_INVOKE_CMD"] == "bmod" and "LSB_SUB_MODIFY_ENVFILE" not in call["environ"]
    assert f'LSB_SUB_COMMAND_LINE="{job}"' in call["parm"] and cluster.show(job)["queue"] == "hooked"
