"""Bringing a guest to rest before it is saved, and back: what of it concerns more than its names.

Whatever a job's start will need is brought into memory once, so that no clone reads it from a disk;
whatever would stir in every clone (timers, a lazy file system, a late boot) is ended. Part of the agent.
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

from wnodes_core.guest import guest_identity, guest_users

# fuse, virtiofs: mounts; virtio_mem: clones with more memory than the template; virtio_net: their network.
MODULES = ("fuse", "virtiofs", "virtio_mem", "virtio_net")
_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
# Run once, to the end and for nothing: their pages, libraries and look-ups are in memory then.
_WARM = (
    ["sh", "-c", "ls / >/dev/null; cat /dev/null; id -u >/dev/null; uname >/dev/null; env true"],
    ["bash", "-c", "test -e / && printf %s x >/dev/null"],
    ["python3", "-I", "-c", "import os, shutil, subprocess, sys, time, socket, struct, json"],
    ["sshfs", "--version"],
    ["fusermount3", "-V"],
    ["mount", "--version"],
    ["prlimit", "--version"],
)
_READ_WHOLE = ("sshfs", "fusermount3")
_SSH_UNITS = ("ssh.service", "sshd.service", "ssh.socket", "sshd.socket")
# Arguments: key types, "--", what starts sshd. Niced, for it takes an emulated guest seconds of the job's.
_NEW_KEYS = """
while [ "$1" != -- ]; do nice -n 19 ssh-keygen -q -N "" -t "$1" -f "/etc/ssh/ssh_host_$1_key"; shift; done
shift
exec "$@"
"""
_JOURNALD = "systemd-journald.service"
_BOOT_S, _QUIET_S, _RUN_S = 180.0, 10.0, 60.0


class Rest:
    """A guest at rest, or one that wants to be. ``root`` is '' in a guest and a folder in tests."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.identity = guest_identity.Identity(root)
        self._new_keys: list[str] = []  # arguments of the script that makes them
        self._systemd = not root and os.path.isdir("/run/systemd/system")
        self._facts: dict[str, Any] = {}

    def begin(self) -> dict[str, Any]:
        """Come to rest. Raises OSError, ValueError: this guest cannot be cloned."""
        began = time.perf_counter()
        if self._systemd:
            _finish_boot()
        told = self.identity.look()
        sshd = self._stop_sshd()
        kinds = self.identity.part()
        if kinds:
            self._new_keys = kinds + ["--"] + sshd
        self.identity.cover_boot_id(must)
        grows = False
        if not self.root:
            grows = _prepare_kernel()
            _warm_up()
        # A rehearsal, as who it is: what cannot be changed fails here, once, and not in every clone.
        self.identity.become({**told, "entropy": told["random"], "clock": time.time()})
        self._facts = guest_users.facts()
        if self._systemd:
            # It took machine and boot id at its start and wrote them into each line. Its sockets stay, and
            # start it anew where a clone has something to log: to restart it costs an emulated one 3 s.
            run(["systemctl", "stop", _JOURNALD], _RUN_S)
        if not self.root:
            os.sync()
            _wait_for_quiet()
        gc.collect()
        if hasattr(gc, "freeze"):  # Python 3.7
            gc.freeze()
        return {"identity": told, "grows": grows, "rest_s": round(time.perf_counter() - began, 3)}

    def end(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Become somebody else, prove it, and let the services know. Raises OSError, ValueError."""
        took = self.identity.become(asked)
        began = time.perf_counter()
        self._tell_services()
        took["services"] = round((time.perf_counter() - began) * 1000, 2)
        told = self.identity.tell()
        # What a clone shares with its template was asked once, at rest.
        now = {name: told[name] for name in ("host_name", "boot_id")}
        return dict(
            self._facts, identity=told, took_ms=took, clock=time.time(), uptime_s=round(time.monotonic(), 2), **now
        )

    def _stop_sshd(self) -> list[str]:
        """No clone answers with the template's keys: sshd waits for new ones. What starts it, [] if none ran."""
        if self._systemd:
            units = [unit for unit in _SSH_UNITS if run(["systemctl", "is-active", unit], _RUN_S) == "active\n"]
            if units:
                must(["systemctl", "stop"] + units)
            return ["systemctl", "start"] + units if units else []
        pid = guest_users.read(self.root + "/run/sshd.pid").strip()
        if self.root or not pid.isdigit() or not os.path.isdir("/proc/" + pid):
            return []
        _end(int(pid))
        return ["/usr/sbin/sshd"]

    def _tell_services(self) -> None:
        if self.root:
            return
        if self._systemd:
            for pid in guest_users.read("/sys/fs/cgroup/system.slice/%s/cgroup.procs" % _JOURNALD).split():
                _end(int(pid))  # somebody logged while the guest rested
        if self._new_keys:
            _start(["sh", "-c", _NEW_KEYS, "sh"] + self._new_keys, os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))


def _finish_boot() -> None:
    """Let the boot come to its end, then stop what a clock that jumps would set off in every clone."""
    run(["systemctl", "is-system-running", "--wait"], _BOOT_S)
    run(["systemctl", "stop", "*.timer"], _RUN_S)


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError:
        pass


def _prepare_kernel() -> bool:
    """Whether this guest can take more memory."""
    for name in MODULES:
        if not os.path.isdir("/sys/module/" + name):
            run(["modprobe", name], _RUN_S)
    if any(line.split()[1:3] == ["/", "ext4"] for line in guest_users.read("/proc/mounts").splitlines()):
        # A new file system's inode tables are written in the background: in every clone, to its overlay.
        run(["mount", "-o", "remount,noinit_itable", "/"], _RUN_S)
    try:
        # "online": to the normal zone. A job's memory is never taken back, and a small guest that
        # grows by movable memory only has no room for the kernel's own tables of it.
        with open("/sys/devices/system/memory/auto_online_blocks", "w") as file:
            file.write("online")
        return os.path.isdir("/sys/bus/virtio/drivers/virtio_mem")
    except OSError:
        return False  # a kernel without memory hot-plug


def _warm_up() -> None:
    try:
        import resource  # noqa: F401 - a command with limits would import it in its own time
    except ImportError:
        pass
    for argv in _WARM:
        run(argv, _RUN_S)
    for name in _READ_WHOLE:
        path = _which(name)
        if path:
            with open(path, "rb") as file:
                file.read()


def _wait_for_quiet() -> None:
    """Until what was started has ended: an interval of nearly nothing but idle."""
    end = time.monotonic() + _QUIET_S
    while time.monotonic() < end:
        before = _busy()
        time.sleep(0.2)
        if _busy() - before <= 2:
            return


def _busy() -> int:
    """Hundredths of seconds that the CPUs have worked."""
    fields = [int(word) for word in guest_users.read("/proc/stat").split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]  # all but idle and iowait


def _which(name: str) -> str:
    return next((folder + "/" + name for folder in _PATH if os.access(folder + "/" + name, os.X_OK)), "")


def _start(argv: list[str], out: int) -> int:
    """Start a program with ``out`` as its fds, which is closed here; its pid, 0 if there is none."""
    path = _which(argv[0])
    environ = {"PATH": ":".join(_PATH), "LC_ALL": "C.UTF-8"}
    try:
        if not path:
            return 0
        if hasattr(os, "posix_spawn"):  # Python 3.8; half of fork's time
            places = [(os.POSIX_SPAWN_DUP2, out, fd) for fd in (0, 1, 2)]
            return os.posix_spawn(path, argv, environ, file_actions=places, setsid=True, setsigdef=[signal.SIGPIPE])
        pid = os.fork()
        if pid == 0:
            _become(path, argv, environ, out)
        return pid
    finally:
        os.close(out)


def _become(path: str, argv: list[str], environ: dict[str, str], out: int) -> None:
    try:
        os.setsid()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and so would what it starts
        for fd in (0, 1, 2):
            os.dup2(out, fd)
        os.execve(path, argv, environ)
    finally:
        os._exit(127)


def run(argv: list[str], timeout_s: float) -> str:
    """Run a program to its end and return what it printed; a missing, failing or slow one is no error."""
    return _run(argv, timeout_s)[1]


def must(argv: list[str]) -> None:
    """Run a program that has to work. Raises OSError with what it said."""
    status, said = _run(argv, _RUN_S)
    if status:
        raise OSError("%s: status %d: %s" % (" ".join(argv), status, said.strip()[-300:]))


def _run(argv: list[str], timeout_s: float) -> tuple[int, str]:
    out = os.open("/run", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    shared = os.dup(out)
    try:
        pid = _start(argv, shared)
        if not pid:
            return 127, "no such program"
        status = _wait(pid, timeout_s)
        os.lseek(out, 0, os.SEEK_SET)
        return status, os.read(out, 65536).decode("utf-8", "replace")
    finally:
        os.close(out)


def _wait(pid: int, timeout_s: float) -> int:
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1] or 1
        time.sleep(0.005)
