"""The twenty scenarios: what is asked, what is done to the job meanwhile, what must have come of it.

Each is one function ``(stage) -> native verdict``; it raises AssertionError where the promise is not kept. Several may
look at one job: ``stage.once`` submits it for the first of them.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lrms import Ask, End, Lrms, Refused, keeper, qemu

from wnodes_core import processes

BIG = 20 << 20
SECRET = bytes(range(256)) * 1200
ENDLESS = 'echo $$ > "$W/$K.begun"; while :; do sleep 0.2; done'
GRACE = 'trap \'echo cleaned > "$W/$K.cleaned"; exit 3\' TERM INT USR2\n' + ENDLESS
PATIENCE_S = 400.0  # most of it a job waits for its turn


class Stage:
    """One batch system while the scenarios play on it, all at once."""

    def __init__(self, lrms: Lrms) -> None:
        self.lrms = lrms
        self._lock = threading.Lock()
        self.job_s = 0.0  # how long the first job took
        self._jobs: dict[int, list[str]] = {}
        self._once: dict[str, tuple[threading.Event, list[Any]]] = {}

    def submit(self, ask: Ask) -> str:
        """Submit a job of the scenario that this thread plays. Raises Refused."""
        job = self.lrms.submit(ask)
        self._jobs.setdefault(threading.get_ident(), []).append(job)
        return job

    def abandon(self) -> None:
        """Take this thread's jobs away: its scenario failed."""
        for job in self._jobs.get(threading.get_ident(), []):
            self.lrms.abandon(job)

    def wait(self, ready: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for something that no event announces."""
        deadline = time.monotonic() + timeout_s
        while not (value := ready()):
            assert time.monotonic() < deadline, f"in vain: {what}"
            time.sleep(0.1)
        return value

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made for the first who asks."""
        with self._lock:
            first = name not in self._once
            event, found = self._once.setdefault(name, (threading.Event(), []))
        if first:
            try:
                found.append(make())
            finally:
                event.set()
        assert event.wait(PATIENCE_S * 2) and found, f"the job of {name} came to nothing"
        return found[0]

    def begun(self, job: str, key: str) -> dict[str, Any]:
        """Wait until the script runs in the guest; the lease."""
        path = self.lrms.work / f"{key}.begun"
        self.wait(lambda: path.exists() and path.read_text(), f"begin of {key} (job {job}): {self.lrms.said(job)[-500:]}")
        return self.lrms.lease(job)

    def booting(self, job: str) -> dict[str, Any]:
        """Wait until the job's VM starts; the lease."""
        self.wait(lambda: qemu(self.lrms.lease(job)), f"VM of job {job}")
        return self.lrms.lease(job)

    def gone(self, lease: dict[str, Any], within_s: float = 20.0) -> None:
        """The VM and its keeper end soon."""
        self.wait(lambda: qemu(lease) is None and keeper(lease) is None, f"end of VM {lease.get('id')}", within_s)

    def run(self, key: str, script: str, **more: Any) -> tuple[str, End]:
        """Submit a job and see it end."""
        job = self.submit(Ask(key, script, **more))
        return job, self.lrms.end(job)


# one job, five looks at it


def _whole(stage: Stage) -> tuple[str, End]:
    work = stage.lrms.work
    (work / "given in").write_text("from the host")
    (work / "stdin").write_bytes(SECRET)
    for name in ("given in", "stdin"):
        os.chmod(work / name, 0o644)
    script = (
        'exec 3>&1 >"$W/$K.facts"; uname -r; id -u; cat "$W/given in"; echo; sha256sum; printf new > "$W/made out"; '
        'chmod 750 "$W/made out"; ln -s "made out" "$W/made link"; '
        f"head -c {BIG} /dev/zero | tr '\\0' x >&3"
    )
    began = time.monotonic()
    done: tuple[str, End] = stage.once("whole", lambda: stage.run("whole", script, stdin=work / "stdin"))
    stage.job_s = stage.job_s or time.monotonic() - began
    return done


def _facts(stage: Stage) -> list[str]:
    return (stage.lrms.work / "whole.facts").read_text().splitlines()


def success(stage: Stage) -> str:
    """an unmodified script runs in the guest as the user"""
    _, end = _whole(stage)
    assert end.code == 0, end
    release, uid = _facts(stage)[:2]
    assert release.endswith("-cloud-amd64") and release != os.uname().release
    assert int(uid) == (stage.lrms.work / "made out").stat().st_uid
    return end.native


def big_stdout(stage: Stage) -> str:
    """20 MiB on stdout arrive whole"""
    job, end = _whole(stage)
    said = stage.lrms.output(job)
    assert said.count(b"x") >= BIG and said.replace(b"x", b"").count(b"\n") < 20, len(said)
    return end.native


def binary_stdin(stage: Stage) -> str:
    """300 kB of every byte value arrive on stdin"""
    _, end = _whole(stage)
    assert _facts(stage)[3].split()[0] == hashlib.sha256(SECRET).hexdigest()
    return end.native


def files_in(stage: Stage) -> str:
    """the job reads the user's files"""
    _, end = _whole(stage)
    assert _facts(stage)[2] == "from the host"
    return end.native


def files_out(stage: Stage) -> str:
    """files come back with owner, mode and links"""
    _, end = _whole(stage)
    made = stage.lrms.work / "made out"
    assert (made.read_text(), made.stat().st_mode & 0o777) == ("new", 0o750)
    assert os.readlink(stage.lrms.work / "made link") == "made out"
    return end.native


# how jobs end by themselves


def _codes(stage: Stage) -> list[End]:
    """Exit codes of the elements of one array, or of two jobs where there are none."""
    codes, lrms = (7, 255), stage.lrms
    if "array" in lrms.cannot:
        return [stage.run(f"code{code}", f"exit {code}")[1] for code in codes]
    ask = Ask("array", 'echo "$K_INDEX" > "$W/$K.$K_INDEX"; [ "$K_INDEX" = 1 ] && exit 7; exit 255', count=2)
    job = stage.submit(ask)
    return [lrms.end(element) for element in lrms.elements(job, 2)]


def exit_code(stage: Stage) -> str:
    """exit 7 is the job's exit code"""
    end = stage.once("codes", lambda: _codes(stage))[0]
    assert end.code == 7, end
    return str(end.native)


def exit_255(stage: Stage) -> str:
    """exit 255 is no fault of ours"""
    end = stage.once("codes", lambda: _codes(stage))[1]
    assert end.code == 255, end
    return str(end.native)


def array(stage: Stage) -> str:
    """each element has its index and its own VM"""
    ends = stage.once("codes", lambda: _codes(stage))
    assert {path.read_text().strip() for path in stage.lrms.work.glob("array.[0-9]*")} == {"1", "2"}
    return ", ".join(end.native for end in ends)


def killed_by_signal(stage: Stage) -> str:
    """a script that dies by SIGSEGV is seen to die by it"""
    _, end = stage.run("segv", "kill -SEGV $$; sleep 10")
    assert end.signal == signal.SIGSEGV or end.code == 128 + signal.SIGSEGV, end
    return end.native


def signal_sent(stage: Stage) -> str:
    """SIGUSR1, sent by the user, reaches the script in the guest"""
    job = stage.submit(Ask("usr1", "trap 'exit 9' USR1\n" + ENDLESS))
    stage.begun(job, "usr1")
    stage.lrms.signal(job, "USR1")
    end = stage.lrms.end(job)
    assert end.code == 9, end
    return end.native


# cancelled


def cancel_queued(stage: Stage) -> str:
    """nothing of the job ever runs, and it never has a VM"""
    job = stage.submit(Ask("queued", 'touch "$W/$K.ran"'))
    assert stage.lrms.queued(job)
    stage.lrms.cancel(job)
    end = stage.lrms.end(job)
    assert not (stage.lrms.work / "queued.ran").exists() and not stage.lrms.lease(job)
    return end.native


def cancel_booting(stage: Stage) -> str:
    """the VM goes at once, the script never begins"""
    job = stage.submit(Ask("booting", 'touch "$W/$K.ran"', start="cold"))
    lease = stage.booting(job)
    stage.lrms.cancel(job)
    stage.gone(lease)
    end = stage.lrms.end(job)
    assert not (stage.lrms.work / "booting.ran").exists(), "it ran"
    return end.native


def cancel_running(stage: Stage) -> str:
    """the script gets its SIGTERM and its grace, then all is gone"""
    job = stage.submit(Ask("running", GRACE))
    lease = stage.begun(job, "running")
    stage.lrms.cancel(job)
    end = stage.lrms.end(job)
    assert (stage.lrms.work / "running.cleaned").exists(), "the script had no grace"
    stage.gone(lease)
    return end.native


def cancel_ending(stage: Stage) -> str:
    """a second cancel while the script cleans up does no harm"""
    script = "trap 'echo x > \"$W/$K.ending\"; sleep 2; exit 0' TERM INT\n" + ENDLESS
    job = stage.submit(Ask("ending", script))
    lease = stage.begun(job, "ending")
    stage.lrms.cancel(job)
    stage.wait((stage.lrms.work / "ending.ending").exists, "the script's end")
    stage.lrms.cancel(job)
    end = stage.lrms.end(job)
    stage.gone(lease)
    return end.native


# limits


def time_limit(stage: Stage) -> str:
    """the script is told, then the job ends"""
    _whole(stage)  # says how quick this machine is today: a limit that ends within the boot would show nothing
    job = stage.submit(Ask("time", GRACE, time_s=max(20, round(2 * stage.job_s))))
    lease = stage.begun(job, "time")
    stage.lrms.hurry(job)
    end = stage.lrms.end(job)
    assert (stage.lrms.work / "time.cleaned").exists(), "the script was not told"
    stage.gone(lease)
    return end.native


def memory_limit(stage: Stage) -> str:
    """a greedy process ends in the guest, the job goes on"""
    script = 'head -c 1G /dev/zero | tail > /dev/null; echo ${PIPESTATUS[1]} > "$W/$K.code"; exit 4'
    _, end = stage.run("memory", script, memory_mib=700)
    assert (stage.lrms.work / "memory.code").read_text() == "137\n"
    assert end.code == 4, end
    return end.native


# the batch system's, the user's, the node's troubles


def requeue(stage: Stage) -> str:
    """the job runs anew, in a fresh VM"""
    script = 'cat /proc/sys/kernel/random/boot_id >> "$W/$K.boots"; [ "$(wc -l < "$W/$K.boots")" = 2 ] && exit 5\n' + ENDLESS
    job = stage.submit(Ask("again", script))
    lease = stage.begun(job, "again")
    stage.lrms.requeue(job)
    stage.gone(lease)
    end = stage.lrms.end(job)
    assert end.code == 5, f"{end} {stage.lrms.about(job)}"
    assert len(set((stage.lrms.work / "again.boots").read_text().split())) == 2
    return end.native


def bad_request(stage: Stage) -> str:
    """a name that is no image's is refused with value and wish, nothing runs"""
    ask = Ask("bad", 'touch "$W/$K.ran"', image=".el9")
    try:
        job = stage.submit(ask)
    except Refused as refused:
        native, said = "refused at submission", str(refused)
    else:
        end = stage.lrms.end(job)
        native, said = end.native, stage.lrms.said(job)
    assert "'.el9'" in said and "want NAME" in said, said
    assert not (stage.lrms.work / "bad.ran").exists()
    return native


def node_trouble(stage: Stage) -> str:
    """QEMU dies under the job: it ends with our words, and is not run twice"""
    job = stage.submit(Ask("trouble", 'echo x >> "$W/$K.runs"\n' + ENDLESS))
    lease = stage.begun(job, "trouble")
    process = qemu(lease)
    assert process is not None and processes.kill(process)
    end = stage.lrms.end(job)
    stage.gone(lease)
    said = stage.lrms.said(job)
    assert "the VM ended while the job ran in it" in said, said
    assert (stage.lrms.work / "trouble.runs").read_text() == "x\n", "its code began twice"
    return end.native


def launcher_killed(stage: Stage) -> str:
    """kill -9 of the launcher: the VM is gone in seconds"""
    job = stage.submit(Ask("killed", ENDLESS))
    lease = stage.begun(job, "killed")
    held = keeper(lease)
    assert held is not None
    launcher = processes.read(held.parent)
    assert launcher is not None and processes.kill(launcher)
    stage.gone(lease)
    return stage.lrms.end(job).native


Scenario = Callable[[Stage], str]
# In the order of their submission: what waits for others comes last.
ALL: dict[str, Scenario] = {
    "success": success,
    "time limit": time_limit,
    "exit code": exit_code,
    "exit code 255": exit_255,
    "array": array,
    "requeue": requeue,
    "killed by a signal": killed_by_signal,
    "signal sent": signal_sent,
    "cancel booting": cancel_booting,
    "cancel running": cancel_running,
    "cancel ending": cancel_ending,
    "memory limit": memory_limit,
    "node trouble": node_trouble,
    "launcher killed": launcher_killed,
    "big stdout": big_stdout,
    "binary stdin": binary_stdin,
    "files in": files_in,
    "files out": files_out,
    "bad request": bad_request,
    "cancel queued": cancel_queued,
}
