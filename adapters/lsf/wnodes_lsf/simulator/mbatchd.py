"""mbatchd: queues and jobs. One host, first come first served, everything in memory."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pwd import getpwuid
from typing import Any

from wnodes_lsf.simulator import wire
from wnodes_lsf.simulator.conf import Conf
from wnodes_lsf.simulator.lim import Lim

PRE_ABORT = 99  # LSB_EXIT_PRE_ABORT (D/T)
OVER = ("DONE", "EXIT")


class Mbatchd:
    """All jobs of the cluster, by ID or ID[INDEX]."""

    def __init__(self, conf: Conf) -> None:
        self.conf = conf
        self.queues = conf.queues()
        self.slots = int(conf.get("LSB_SIM_SLOTS", "4"))
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nios: dict[str, int] = {}
        # Job files lie in the users' homes by second and number, and two clusters of one machine share those.
        self.last = 100 * os.getpid()
        self.signals: list[dict[str, str]] = []
        self.after: list[dict[str, Any]] = []
        self.lim = Lim(conf)
        self.table: dict[str, Callable[..., dict[str, Any]]] = {
            "submit": self.submit,
            "jobs": self.show,
            "signal": self.signal,
            "requeue": self.requeue,
            "modify": self.modify,
            "switch": self.switch,
        }

    def serve(self) -> None:
        """Until the process is killed."""
        listener = wire.listen(self.conf.socket, 0o666)
        listener.settimeout(0.5)
        while True:
            self.lim.read()
            with suppress(TimeoutError):
                sock, _ = listener.accept()
                sock.settimeout(10)
                with sock, suppress(OSError, ValueError):
                    self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        message, fds = wire.receive(sock)
        uid, gid = wire.peer(sock)
        if message["op"] == "poll" and uid == 0:
            self._poll(sock, message)
            return
        try:
            answer = self.table[message["op"]](message, uid, gid, fds)
        except (wire.Refused, KeyError) as refusal:
            answer = {"error": str(refusal)}
        wire.send(sock, answer)

    # -- what users ask ---------------------------------------------------------------------------

    def submit(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """A new job, or the elements of an array; root may not submit (T)."""
        if uid == 0:
            raise wire.Refused("User permission denied. Job not submitted.")
        options = message["options"]
        queue = options.get("QUEUE") or next(iter(self.queues))
        if queue not in self.queues:
            raise wire.Refused(f"{queue}: No such queue. Job not submitted.")
        problem = self.lim.problem(options.get("RES_REQ", ""))
        if problem:
            raise wire.Refused(f"Bad resource requirement syntax: {problem}. Job not submitted.")
        self.last += 1
        for index in _indices(options.get("JOB_NAME", "")) or [0]:
            self._add(message, queue, uid, gid, index)
        if fds:
            self.nios[str(self.last)] = fds[0]
        return {"id": self.last, "queue": queue}

    def _add(self, message: dict[str, Any], queue: str, uid: int, gid: int, index: int) -> None:
        key = f"{self.last}[{index}]" if index else str(self.last)
        options = message["options"]
        limit = options.get("RLIMIT_RUN") or self.queues[queue].get("RUNLIMIT", "")
        self.jobs[key] = {
            **{name: message[name] for name in ("environ", "cwd", "command", "script", "data", "interactive")},
            **{"options": options, "key": key, "id": self.last, "index": index, "uid": uid, "gid": gid},
            **{"queue": queue, "stat": "PSUSP" if options.get("HOLD") else "PEND", "submitted": int(time.time())},
            "user": getpwuid(uid).pw_name,
            "slots": int(options.get("NUM_PROCESSORS", "1")),
            "run_limit_s": float(limit) * self.conf.seconds("LSB_SIM_MINUTE", 60) if limit else 0.0,
            "status": None,
            "not_before": 0.0,
            "order": time.time(),
            "pre_failures": 0,
        }

    def show(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """Jobs as bjobs shows them."""
        chosen = self._chosen(message["specs"]) if message["specs"] else list(self.jobs.values())
        shown = []
        for job in chosen:
            mine = message["user"] in ("all", job["user"])
            if message["specs"] or (mine and (message["all"] or job["stat"] not in OVER)):
                shown.append(self._shown(job))
        host = message.get("host")
        return {
            "jobs": [
                j for j in shown if not host or j["exec_host"].rpartition("*")[2].split(".")[0] == host.split(".")[0]
            ]
        }

    def _shown(self, job: dict[str, Any]) -> dict[str, Any]:
        away = job["stat"] in ("PEND", "PSUSP")
        slots = f"{job['slots']}*" if job["slots"] > 1 else ""
        status = job["status"]
        code = (
            "" if status is None else str(status >> 8 if status >> 8 else (128 + (status & 127) if status & 127 else 0))
        )
        return {
            **{name: str(job[name]) for name in ("stat", "user", "queue", "slots")},
            **{"jobid": str(job["id"]), "jobindex": str(job["index"]), "key": job["key"], "status": job["status"]},
            **{"exec_host": "" if away else f"{slots}{self.conf.host}", "exit_code": code, "command": job["command"]},
            **{"job_name": job["options"].get("JOB_NAME", job["command"]), "from_host": self.conf.host},
            "options": job["options"],
        }

    def _chosen(self, specs: list[str]) -> list[dict[str, Any]]:
        found = []
        for spec in specs:
            hits = [job for key, job in self.jobs.items() if spec in (key, str(job["id"]))]
            if not hits:
                raise wire.Refused(f"Job <{spec}> is not found")
            found += hits
        return found

    def _allowed(self, specs: list[str], uid: int) -> list[dict[str, Any]]:
        chosen = self._chosen(specs)
        for job in chosen:
            if uid not in (0, job["uid"]):
                raise wire.Refused(f"Job <{job['key']}>: User permission denied")
        return [job for job in chosen if job["stat"] not in OVER]

    def signal(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """bkill, bstop, bresume."""
        for job in self._allowed(message["specs"], uid):
            name = message["signal"]
            if job["stat"] in ("PEND", "PSUSP") and not job.get("sent"):
                job["stat"] = {"KILL": "EXIT", "STOP": "PSUSP", "CONT": "PEND"}.get(name, job["stat"])
                if job["stat"] == "EXIT":
                    job["status"] = 0  # never ran
                continue
            job["stat"] = {"STOP": "USUSP", "CONT": "RUN"}.get(name, job["stat"])
            job["killed"] = job.get("killed") or name == "KILL"
            self.signals.append({"key": job["key"], "signal": name})
        return {}

    def requeue(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """brequeue: end it, and queue it again."""
        for job in self._allowed(message["specs"], uid):
            job["requeue"] = True
            self.signals.append({"key": job["key"], "signal": "KILL"})
        return {}

    def modify(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """bmod: options of a job that waits."""
        for job in self._allowed(message["specs"], uid):
            job["options"] = job["options"] | message["options"]
            job["queue"] = message["options"].get("QUEUE", job["queue"])
        return {}

    def switch(self, message: dict[str, Any], uid: int, gid: int, fds: list[int]) -> dict[str, Any]:
        """bswitch: no esub hears of it."""
        for job in self._allowed(message["specs"], uid):
            job["queue"] = message["queue"]
        return {}

    # -- what sbatchd says and hears --------------------------------------------------------------

    def _poll(self, sock: socket.socket, message: dict[str, Any]) -> None:
        for report in message["reports"]:
            told = self.jobs[report["key"]]
            if report["event"] == "started":
                told["stat"], told["pid"] = "RUN", report["pid"]
            else:
                self._ended(told, report)
        job = self._next(message)
        # A job that sbatchd lost before it could say so is sent again.
        answer = {"signals": self.signals, "after": self.after, "start": job}
        fd = self.nios.pop(job["key"], -1) if job else -1
        wire.send(sock, answer, [fd] if fd >= 0 else [])
        if fd >= 0:
            os.close(fd)
        self.signals, self.after = [], []
        if job:
            job["sent"] = True

    def _next(self, message: dict[str, Any]) -> dict[str, Any] | None:
        busy = [job for job in self.jobs.values() if job.get("sent") and job["stat"] not in OVER]
        free = self.slots - sum(job["slots"] for job in busy)
        waiting = [job for job in self.jobs.values() if job["stat"] == "PEND" and not job.get("sent")]
        for job in sorted(waiting, key=lambda each: each["order"]):
            if job["slots"] <= free and self.lim.fits(job["options"].get("RES_REQ", ""), busy):
                # A job whose PRE_EXEC failed waits two seconds at the head, and nothing passes it (T).
                return job if time.time() >= job["not_before"] else None
        return None

    def _ended(self, job: dict[str, Any], report: dict[str, Any]) -> None:
        status, phase = report["status"], report["phase"]
        job["sent"] = False
        if phase[0] == "failed":
            self._pre_failed(job, phase[1], int(phase[2]))
            return
        if phase[0] != "run":  # killed before the job began: no POST_EXEC (T)
            job["stat"], job["status"] = "EXIT", status
            return
        again = bool(job.pop("requeue", False)) or self._asks_for_requeue(job, status)
        job["stat"] = "PEND" if again else ("DONE" if status == 0 else "EXIT")
        job["status"] = None if again else status
        self.after.append({"job": job, "status": status, "ends": report["ends"], "requeued": again})

    def _asks_for_requeue(self, job: dict[str, Any], status: int) -> bool:
        """REQUEUE_EXIT_VALUES: codes, also 128+n of a signal (D); without limit (T). EXCLUDE(n) needs another host."""
        code = status >> 8 if status >> 8 else 128 + (status & 127) if status & 127 else 0
        values = self.queues[job["queue"]].get("REQUEUE_EXIT_VALUES", "")
        plain = re.sub(r"EXCLUDE\([^)]*\)", " ", values).split()
        excluded = " ".join(re.findall(r"EXCLUDE\(([^)]*)\)", values)).replace(",", " ").split()
        if job.get("killed") or (str(code) not in plain and str(code) not in excluded):
            return False
        if str(code) in excluded and self.conf.documented:
            job["not_before"] = float("inf")  # one host only: it stays pending
        return True

    def _pre_failed(self, job: dict[str, Any], level: str, status: int) -> None:
        """99: EXIT. A signal: EXIT (T). Anything else: back to PEND at the head (D/T)."""
        job["pre_failures"] += 1
        most = self.queues[job["queue"]].get("MAX_PREEXEC_RETRY", "")
        tired = most and self.conf.documented and job["pre_failures"] > int(most)
        if status >> 8 == PRE_ABORT or status & 127 or job.get("killed") or tired:
            job["stat"], job["status"] = "EXIT", status
        else:
            job["stat"], job["order"], job["not_before"] = (
                "PEND",
                0.0,
                time.time() + self.conf.seconds("LSB_SIM_PRE_RETRY", 2),
            )
        if level == "job":  # POST_EXEC runs after a failed -E, and not after a failed PRE_EXEC of the queue (T)
            self.after.append({"job": job, "status": status, "ends": 0, "requeued": job["stat"] == "PEND"})


def _indices(name: str) -> list[int]:
    match = re.search(r"\[([\d,-]+)\]\Z", name)
    found: list[int] = []
    for part in match[1].split(",") if match else []:
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def main() -> None:
    """``mbatchd``, as root."""
    os.umask(0o022)
    print(f"mbatchd: {os.getpid()}", file=sys.stderr, flush=True)
    Mbatchd(Conf.read()).serve()
