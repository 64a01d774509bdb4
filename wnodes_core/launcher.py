"""The launcher: stands in front of a task and becomes it, inside the job's VM.

It asks for the lease, starts the keeper if it is the one elected to, runs one command in the
guest with its own stdin, stdout and stderr, and ends as that command ended. On any doubt it
refuses: a job that asked for a VM never runs on the host.

Exit code 125 is ours: the VM could not be had or was lost; the message on stderr says why.
Imports stay few, because every task of every VM job pays for them.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from wnodes_core.agent.client import call
from wnodes_core.command import PATH, clean_environment
from wnodes_core.errors import CommandError, HostBusy, WnodesError
from wnodes_core.guest import client
from wnodes_core.guest.client import Command
from wnodes_core.guest.hostcmd import for_guest

REFUSED = 125
LAUNCH_TIMEOUT_S = 3600.0
TELL_S = 10.0
LIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "stack")


def main(lrms: str, run_dir: str = "/run/wnodes") -> NoReturn:
    """Run this process's own task in the job's VM; never returns. wnodesd listens in ``run_dir``."""
    closed = client.reserve_stdio()
    task = None
    adapter = importlib.import_module(f"wnodes_{lrms}.task")
    try:
        task = adapter.read_task(tuple(sys.argv), dict(os.environ))
        # A batch system whose hooks are the user's may never have told the node of this job: then we do.
        request = getattr(task, "request", None)
        folder, host_commands = _lease(lrms, f"{run_dir}/wnodesd.sock", task.host_commands, request)
        command = command_of(
            task.argv,
            for_guest(task.environ),
            carried=task.carried,
            leader_only=task.leader_signals,
            on_tstp="pause",
            host_commands=_where(host_commands),
        )
        end = client.run(f"{folder}/keeper.sock", command, closed=closed, progress=client.show_progress)
    except WnodesError as error:
        _tell(getattr(adapter, "refusal", None), error)
        refuse(error, getattr(task, "exit_again", REFUSED) if error.again else REFUSED)
    if not end.signal and end.code == getattr(task, "exit_again", None):
        # The job's own code is not to be taken for our wish to run it anew.
        print(f"wnodes: the job ended with {end.code}, our sign for another run: told as {REFUSED}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(REFUSED)
    finish(command, end)


def finish(command: Command, end: client.Exit) -> NoReturn:
    """End as the command ended; say why if it never started."""
    if end.error:
        print(f"wnodes: {command.argv[0]}: {end.error}", file=sys.stderr, flush=True)
    client.die_like(end)
    raise AssertionError("die_like returned")


def _where(names: tuple[str, ...]) -> dict[str, str]:
    """Where the host has these programs: at their own path, or searched on a fixed one and not on the user's."""
    found = ((os.path.basename(name), shutil.which(name, path=PATH)) for name in names)
    return {name: path for name, path in found if path}


def _tell(refusal: Callable[..., Sequence[Sequence[str]]] | None, error: WnodesError) -> None:
    """Have the batch system told by what the adapter names for it, where that is the job's own to say."""
    for argv in refusal(error, dict(os.environ)) if refusal else ():
        from wnodes_core.command import run  # only on the way to an error

        with suppress(CommandError):  # our exit code and words on stderr say it, too
            run(argv, timeout_s=TELL_S, environ=dict(os.environ))


def refuse(error: WnodesError, code: int = REFUSED) -> NoReturn:
    """Say why there is no VM and end with our own exit code, or with the one that has the LRMS run the job anew."""
    print(f"wnodes: error: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def _lease(
    lrms: str, daemon: str, host_commands: tuple[str, ...], request: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """The lease's folder, and what the guest may ask this host to run: the site's list before the adapter's.

    If we were elected to, the keeper has been started there.
    """
    began, asked = process_began(), time.monotonic()
    question = {"op": "launch", "lrms": lrms, "host_commands": list(host_commands), "origin": began}
    question |= {} if request is None else {"request": request}
    grant = call(question, on_progress=client.show_progress, timeout_s=LAUNCH_TIMEOUT_S, path=daemon)
    steps = [("launcher", 0.0, asked - began), ("lease", asked - began, time.monotonic() - asked)]
    folder = str(grant["folder"])
    host_commands = tuple(grant.get("host_commands", host_commands))
    if grant["role"] == "join":
        return folder, host_commands
    plan = {**grant["plan"], "host_commands": tuple(map(os.path.basename, host_commands))}
    given = {"plan": plan, "token": grant["token"], "daemon": daemon, "disabled": grant.get("disabled", [])}
    given["trace"] = {"origin": began, "steps": steps}
    if grant["home"] == "step":
        given["launcher"] = os.getpid()  # this task lives as long as the job: the VM ends with it, even by kill -9
    start_keeper(given, leave_family=grant["home"] == "job")
    return folder, host_commands


def process_began() -> float:
    """When this process was made, on ``time.monotonic()``'s clock: within 5 ms, as the kernel counts it in ticks of 10.

    That is LAUNCH being called: what the batch system made became us.
    """
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19]) + 0.5
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(age, time.process_time())


class Waiting(NamedTuple):
    """A keeper that loads what it will need while we still ask what it is to keep; it ends if we never say."""

    pid: int
    pipe: int


def start_keeper(given: dict[str, Any], *, leave_family: bool, waiting: Waiting | None = None) -> int:
    """Start the keeper (or the one that waits) with what it needs on its stdin; its pid, or 0 if it left our family.

    Raises HostBusy if no process can be made.
    """
    pid, pipe = waiting or ready_keeper(leave_family=leave_family)
    with os.fdopen(pipe, "wb") as stdin:
        stdin.write(json.dumps(given).encode())
    if leave_family:
        os.waitpid(pid, 0)
        return 0
    return pid


def ready_keeper(*, leave_family: bool) -> Waiting:
    """Start a keeper that waits for its orders.

    ``leave_family`` forks twice: a keeper that is to outlive this step must not be found by a
    process tracker that follows parents (Slurm's proctrack/linuxproc).

    Raises HostBusy if no process can be made.
    """
    try:
        receive, send = os.pipe()
        pid = os.fork()
    except OSError as error:
        raise HostBusy(f"cannot start the keeper: {error}") from error
    if pid == 0:
        _become_keeper(receive, send, leave_family)
    os.close(receive)
    return Waiting(pid, send)


def keeper_gone(pid: int) -> bool:
    """Whether the keeper that ``start_keeper`` gave as ours has ended; it is not reaped by asking."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _become_keeper(receive: int, send: int, leave_family: bool) -> NoReturn:
    try:
        os.setsid()
        if leave_family and os.fork():
            os._exit(0)
        os.close(send)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(receive, 0)
        os.dup2(null, 1)
        if os.environ.get("WNODES_TRACE") != "1":  # its trace goes where ours does
            os.dup2(null, 2)
        # Everything else the task was given (Slurm's own pipes among it) stays with the task:
        # a copy here would hold them open after its end.
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))
        argv = [sys.executable, "-I", "-m", "wnodes_core.keeper"]
        os.execve(sys.executable, argv, clean_environment(keep=("WNODES_TRACE",)))
    finally:
        os._exit(REFUSED)


def command_of(argv: tuple[str, ...], environ: dict[str, str], *, carried: tuple[str, ...] = (), **how: Any) -> Command:
    """What to run in the guest: ``argv`` as this very process would have run it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return Command(
        argv=list(argv),
        environ=environ,
        cwd=_cwd(),
        umask=umask,
        uid=os.getuid(),
        gid=os.getgid(),
        groups=os.getgroups(),
        files=[_carry(path) for path in carried],
        rlimits={name: list(resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))) for name in LIMITS},
        **{"tty": os.isatty(0) and os.isatty(1), **how},
    )


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _carry(path: str) -> dict[str, Any]:
    """A file that the guest cannot see (the LRMS's spool) and the command needs at its own path."""
    with open(path, "rb") as file:
        content = base64.b64encode(file.read()).decode()
    return {"path": path, "mode": 0o700, "content": content, "uid": os.getuid(), "gid": os.getgid()}
