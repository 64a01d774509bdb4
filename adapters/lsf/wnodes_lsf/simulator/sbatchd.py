"""sbatchd: starts this host's jobs, signals them, and reports how they ended. May be killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from wnodes_lsf.simulator import jobs, spawn, wire
from wnodes_lsf.simulator.conf import Conf

POLL_S = 0.05
UNKNOWN = 65280  # the exit status of a job whose end nobody saw (T)


class Sbatchd:
    """The jobs of this host. What must survive a crash lies in a file."""

    def __init__(self, conf: Conf) -> None:
        self.conf = conf
        self.queues = conf.queues()
        self.path = f"{conf.get('LSB_SHAREDIR')}/sbatchd.state"
        self.running: dict[str, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.afters: set[int] = set()
        self._recover()

    def _recover(self) -> None:
        """Jobs that an earlier sbatchd started: their processes are nobody's children now."""
        with suppress(OSError), open(self.path) as file:
            self.running = json.load(file)
        for entry in self.running.values():
            entry["mine"] = False

    def _save(self) -> None:
        with open(f"{self.path}.new", "w") as file:
            json.dump(self.running, file)
        os.rename(f"{self.path}.new", self.path)

    def serve(self) -> None:
        """Until the process is killed."""
        while True:
            self._reap()
            self._look_after_strangers()
            self._timers()
            with suppress(OSError, wire.Refused):
                self._poll()
            time.sleep(POLL_S)

    def _poll(self) -> None:
        """Tell mbatchd what happened, hear what to do. At most one job a time is started."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        with sock:
            sock.connect(self.conf.socket)
            told = list(self.reports)
            wire.send(sock, {"op": "poll", "reports": told, "running": list(self.running)})
            answer, fds = wire.receive(sock)
        del self.reports[: len(told)]
        for order in answer.get("signals", []):
            self._signal(order["key"], order["signal"])
        if answer.get("start"):
            self._start(answer["start"], fds[0] if fds else -1)
        for fd in fds:
            os.close(fd)
        for after in answer.get("after", []):
            self._after(after["job"], after["status"], after["ends"], after["requeued"])

    def _start(self, job: dict[str, Any], nios_fd: int) -> None:
        queue = self.queues[job["queue"]]
        pid = os.fork()
        if pid == 0:
            jobs.run(self.conf, job, queue, nios_fd)
        entry = {"job": job, "pid": pid, "birth": birth(pid), "began": time.time(), "mine": True, "staged": []}
        self.running[job["key"]] = entry
        self._save()
        self.reports.append({"key": job["key"], "event": "started", "pid": pid})

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            key = next((k for k, e in self.running.items() if e["pid"] == pid and e["mine"]), None)
            if key:
                self._ended(key, status, ends=1)

    def _look_after_strangers(self) -> None:
        """Of a job that an earlier sbatchd started only its absence can be seen: its exit code is lost (T)."""
        for key, entry in list(self.running.items()):
            if "orphan" in entry:
                if not group_lives(entry["pid"]):
                    self._ended(key, entry["orphan"], ends=1)
            elif not entry["mine"] and birth(entry["pid"]) != entry["birth"]:
                self._ended(key, UNKNOWN, ends=2)

    def _ended(self, key: str, status: int, ends: int) -> None:
        entry = self.running[key]
        phase = jobs.phase_of(entry["job"])
        if phase[0] == "run" and entry["mine"] and group_lives(entry["pid"]) and os.WIFSIGNALED(status):
            entry |= {"mine": False, "orphan": status}  # only res was killed: the job runs while its group does (T)
            return
        del self.running[key]
        self._save()
        self.reports.append({"key": key, "event": "ended", "status": status, "phase": phase, "ends": ends})

    def _after(self, job: dict[str, Any], status: int, ends: int, requeued: bool) -> None:
        if os.fork() == 0:
            jobs.after(self.conf, job, self.queues[job["queue"]], status, ends=ends, requeued=requeued)

    # -- signals ----------------------------------------------------------------------------------

    def _signal(self, key: str, name: str) -> None:
        entry = self.running.get(key)
        if entry is None:
            return
        if name == "KILL":  # bkill, and bkill -s KILL: the same staged sequence; a second one changes nothing (T)
            self._terminate(entry)
        elif name in ("STOP", "CONT"):
            self._control(entry, "SUSPEND" if name == "STOP" else "RESUME", name)
        else:
            self._send(entry, getattr(signal, f"SIG{name}"))

    def _terminate(self, entry: dict[str, Any]) -> None:
        if entry["staged"]:
            return
        custom = self._action(entry, "TERMINATE")
        if custom:  # gets no escalation to SIGKILL (T)
            self._run_action(entry, custom)
            return
        pause = self.conf.seconds("JOB_TERMINATE_INTERVAL", 10)
        now = time.time()
        self._send(entry, signal.SIGCONT)
        self._send(entry, signal.SIGINT)
        entry["staged"] = [[now + pause, signal.SIGTERM], [now + 2 * pause, signal.SIGKILL]]

    def _control(self, entry: dict[str, Any], control: str, name: str) -> None:
        custom = self._action(entry, control)
        if custom:
            self._run_action(entry, custom)
        elif name == "STOP":  # SIGTSTP for interactive jobs, SIGSTOP for batch (D/T)
            self._send(entry, signal.SIGTSTP if entry["job"]["options"].get("INTERACTIVE") else signal.SIGSTOP)
        else:
            self._send(entry, signal.SIGCONT)

    def _action(self, entry: dict[str, Any], control: str) -> str:
        text = self.queues[entry["job"]["queue"]].get("JOB_CONTROLS", "")
        match = re.search(rf"{control}\[([^\]]*)\]", text)
        return match[1].strip() if match else ""

    def _run_action(self, entry: dict[str, Any], action: str) -> None:
        """A signal's name, or a command: /bin/sh -c as the user, with LSB_JOBPIDS and LSB_JOBPGIDS (T)."""
        if action in signal.Signals.__members__:
            self._send(entry, signal.Signals[action])
            return
        job = entry["job"]
        environ = jobs.environment(self.conf, job, jobs.spool(job), entry["pid"])
        groups = " ".join(map(str, self._groups(entry)))
        if os.fork() == 0:
            jobs.settle()
            jobs.become(job)
            spawn.shell(action, environ | {"LSB_JOBPIDS": groups, "LSB_JOBPGIDS": groups})
            os._exit(0)

    def _groups(self, entry: dict[str, Any]) -> list[int]:
        groups = [entry["pid"]]
        with suppress(OSError, ValueError), open(f"{jobs.spool(entry['job'])}.pgid") as file:
            groups.append(int(file.read()))
        return groups

    def _send(self, entry: dict[str, Any], number: int) -> None:
        for group in self._groups(entry):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def _timers(self) -> None:
        now = time.time()
        for entry in self.running.values():
            if entry["staged"] and now >= entry["staged"][0][0]:
                due = entry["staged"].pop(0)
                self._send(entry, due[1])
                if not entry["staged"]:
                    entry["staged"] = [[now + 3600, signal.SIGKILL]]
            limit = entry["job"]["run_limit_s"]
            if limit and now - entry["began"] > limit and not entry.get("warned"):
                entry["warned"] = now  # SIGUSR2, ten minutes later the end (D/T)
                self._send(entry, signal.SIGUSR2)
            grace = self.conf.seconds("LSB_SIM_RUNLIMIT_GRACE", 600)
            if entry.get("warned") and now - entry["warned"] > grace:
                self._terminate(entry)


def birth(pid: int) -> str:
    """The clock tick at which a process was born; '' if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[19]


def group_lives(group: int) -> bool:
    """Whether a process group has a living process."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            words = file.read().rpartition(")")[2].split()
            if int(words[2]) == group and words[0] not in "ZX":
                return True
    return False


def main() -> None:
    """``sbatchd``, as root."""
    os.umask(0o022)
    print(f"sbatchd: {os.getpid()}", file=sys.stderr, flush=True)
    Sbatchd(Conf.read()).serve()
