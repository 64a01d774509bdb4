"""What sbatchd's children do: become the user, run the hooks in order, become res (T: the contract's sections 2-4)."""

from __future__ import annotations

import base64
import os
import pwd
import signal
import sys
from typing import Any, NoReturn

from wnodes_lsf.simulator import spawn
from wnodes_lsf.simulator.conf import Conf

PRE_ABORT = 99


def environment(conf: Conf, job: dict[str, Any], job_file: str, pid: int) -> dict[str, str]:
    """The user's environment, over which sbatchd sets its own: a forged LSB_JOBID is overwritten (T); others pass."""
    hosts = " ".join([conf.host] * job["slots"])
    person = pwd.getpwuid(job["uid"])
    return {
        **job["environ"],
        "LSB_JOBID": str(job["id"]),
        "LSB_JOBINDEX": str(job["index"]),
        "LSB_QUEUE": job["queue"],
        "LSB_JOBNAME": job["options"].get("JOB_NAME", job["command"]),
        "LSB_HOSTS": hosts,
        "LSB_MCPU_HOSTS": f"{conf.host} {job['slots']}",
        "LSB_SUB_HOST": conf.host,
        "LSB_JOBFILENAME": job_file,
        "LS_JOBPID": str(pid),
        "LS_SUBCWD": job["cwd"],
        "LSFUSER": person.pw_name,
        "USER": person.pw_name,
        "LSF_ENVDIR": conf.envdir,
        "LSF_SERVERDIR": conf.serverdir,
        "LSF_BINDIR": conf.get("LSF_BINDIR"),
    }


def become(job: dict[str, Any]) -> None:
    """The job's user for good."""
    person = pwd.getpwuid(job["uid"])
    os.initgroups(person.pw_name, job["gid"])
    os.setgid(job["gid"])
    os.setuid(job["uid"])
    os.umask(0o022)


def settle() -> None:
    """As a fresh process: sbatchd's own signal handling is not the job's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def spool(job: dict[str, Any]) -> str:
    """The job file's path: in the user's home, as the contract's section 4 has it."""
    home = pwd.getpwuid(job["uid"]).pw_dir
    suffix = f".{job['index']}" if job["index"] else ""
    return f"{home}/.lsbatch/{job['submitted']}.{job['id']}{suffix}"


def run(conf: Conf, job: dict[str, Any], queue: dict[str, str], nios_fd: int) -> NoReturn:
    """Be the job, from sbatchd's fork on: eexec START, queue PRE, job PRE, then res in this very process."""
    try:
        os.setsid()
        settle()
        become(job)
        job_file = spool(job)
        os.makedirs(os.path.dirname(job_file), mode=0o700, exist_ok=True)
        environ = environment(conf, job, job_file, os.getpid())
        _say(job_file, "start")
        eexec(conf, job, environ, "START")
        _say(job_file, "pre")
        for level, line in (("queue", queue.get("PRE_EXEC", "")), ("job", job["options"].get("PRE_EXEC", ""))):
            status = _pre(line, environ) if line else 0
            if status:
                _say(job_file, f"failed {level} {status}")
                os._exit(0)
        _write_job_file(job, queue, job_file)
        _say(job_file, "run")
        _become_res(conf, job, environ, job_file, nios_fd)
    except BaseException as error:  # noqa: BLE001 - a forked child may not return into sbatchd's loop
        print(f"sbatchd: job {job['id']}: {error!r}", file=sys.stderr, flush=True)
    os._exit(125)


def eexec(conf: Conf, job: dict[str, Any], environ: dict[str, str], when: str) -> None:
    """Run the cluster's eexec for this job: own group, /tmp, the esub's data on stdin; its result is ignored (T)."""
    path = f"{conf.serverdir}/eexec"
    if os.access(path, os.X_OK):
        spawn.run([path], {**environ, "LS_EXEC_T": when}, stdin=base64.b64decode(job["data"]))


def _pre(line: str, environ: dict[str, str]) -> int:
    # In the job's own group: bkill during PRE_EXEC kills it at once (T).
    return spawn.run(["/bin/sh", "-c", line], {**environ, "PATH": spawn.SAFE_PATH}, own_group=False)[0]


def _say(job_file: str, phase: str) -> None:
    """Leave word of how far the job is for sbatchd, also for one that is started anew."""
    with open(f"{job_file}.phase.new", "w") as file:
        file.write(phase)
    os.rename(f"{job_file}.phase.new", f"{job_file}.phase")


def phase_of(job: dict[str, Any]) -> list[str]:
    """What ``_say`` said last, in words."""
    try:
        with open(f"{spool(job)}.phase") as file:
            return file.read().split()
    except OSError:
        return ["start"]


def started_command(job: dict[str, Any], queue: dict[str, str]) -> str:
    """The user's command with the queue's starter: textual, nothing escaped, in both forms (T)."""
    command = "$LSB_JOBFILENAME.shell" if job["script"] is not None else job["command"]
    starter = queue.get("JOB_STARTER", "")
    if "%USRCMD" in starter:
        return starter.replace("%USRCMD", command)
    return f"{starter} {command}" if starter else str(command)


def _write_job_file(job: dict[str, Any], queue: dict[str, str], job_file: str) -> None:
    text = f"#! /bin/sh\n{started_command(job, queue)}\n"
    files = {job_file: text} | ({f"{job_file}.shell": job["script"]} if job["script"] is not None else {})
    for path, content in files.items():
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(file.fileno(), 0o700)
            file.write(content)


def _become_res(conf: Conf, job: dict[str, Any], environ: dict[str, str], job_file: str, nios_fd: int) -> None:
    options = job["options"]
    mode = "batch" if nios_fd < 0 else "pty" if options.get("PTY") else "pipes"
    if mode == "batch":
        _redirect(job, job_file)
    else:
        os.set_inheritable(nios_fd, True)
    os.chdir(job["cwd"])
    code = "from wnodes_lsf.simulator.res import main; main()"
    argv = [
        f"{conf.serverdir}/res",
        "-I",
        "-c",
        _PRELUDE.format(root=package_root(), code=code),
        job_file,
        mode,
        str(nios_fd),
    ]
    os.closerange(3, nios_fd if nios_fd > 3 else 3)
    os.execve(argv[0], argv, environ)


_PRELUDE = "import sys; sys.path.insert(0, {root!r}); {code}"


def package_root() -> str:
    """Where ``wnodes_lsf`` lies: LSF's programs run an interpreter that knows nothing of it."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _redirect(job: dict[str, Any], job_file: str) -> None:
    def named(path: str) -> str:
        path = path.replace("%J", str(job["id"])).replace("%I", str(job["index"]))
        return os.path.join(job["cwd"], path)

    options = job["options"]
    out = named(options["OUT_FILE"]) if options.get("OUT_FILE") else f"{job_file}.out"
    err = named(options["ERR_FILE"]) if options.get("ERR_FILE") else ""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(named(options.get("IN_FILE") or os.devnull), os.O_RDONLY), 0)
    os.dup2(os.open(out, flags, 0o644), 1)
    os.dup2(os.open(err, flags, 0o644) if err else 1, 2)


def after(
    conf: Conf, job: dict[str, Any], queue: dict[str, str], status: int, *, ends: int, requeued: bool
) -> NoReturn:
    """What follows a job: eexec END (twice after a crash of sbatchd: T), job POST, queue POST, in another process."""
    try:
        os.setsid()
        settle()
        become(job)
        environ = environment(conf, job, spool(job), os.getpid()) | {"LSB_JOBEXIT_STAT": str(status)}
        if requeued:
            environ["LSB_JOBPEND"] = " "  # T
        for _ in range(ends):
            eexec(conf, job, environ, "END")
        for line in (job["options"].get("POST_EXEC", ""), queue.get("POST_EXEC", "")):
            if line:
                spawn.shell(line, environ)
    except BaseException as error:  # noqa: BLE001 - as above
        print(f"sbatchd: after job {job['id']}: {error!r}", file=sys.stderr, flush=True)
    os._exit(0)
