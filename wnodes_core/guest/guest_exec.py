"""Starting one command in the guest exactly as told. Part of the agent (see ``bundle``)."""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

import binascii
import fcntl
import os
import signal
import struct
from typing import Any

from wnodes_core.guest import frames, guest_mounts, guest_spawn, pump

_SETPIPE = 1031  # F_SETPIPE_SZ: not in the fcntl module before Python 3.10
_TIOCSCTTY, _TIOCSWINSZ = 0x540E, 0x5414
_NEVER_KEPT = (signal.SIGKILL, signal.SIGSTOP)


class Command:
    """One command: its leader's pid, its flow, how it ended."""

    def __init__(self, stream: int, pid: int, flow: pump.Flow, master: int) -> None:
        self.stream = stream
        self.pid = pid
        self.flow = flow
        self.master = master  # the terminal's master fd, -1 without one
        self.status: int | None = None  # as waitpid gave it
        self.linger = False  # what it leaves running may live on (a daemon of root's)
        self.mount: guest_mounts.Awaited | None = None  # it is over once this is there

    def signal(self, number: int, *, whole_group: bool) -> None:
        """Signal the leader, or its whole process group. A process that has gone is no error."""
        try:
            if whole_group:
                os.killpg(self.pid, number)
            elif self.status is None:
                os.kill(self.pid, number)
        except OSError:
            pass

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; the kernel sends WINCH."""
        if self.master >= 0:
            set_size(self.master, rows, columns)

    def ending(self) -> dict[str, Any]:
        """The EXIT message."""
        status = self.status or 0
        problem = self.mount.show() if self.mount is not None and not status else ""
        if problem:
            return {"code": 1, "error": problem}
        if os.WIFSIGNALED(status):
            return {"signal": os.WTERMSIG(status), "core": os.WCOREDUMP(status)}
        return {"code": os.WEXITSTATUS(status)}

    def close(self) -> None:
        """Let go of all fds."""
        self.flow.close()
        if self.master >= 0:
            os.close(self.master)
        if self.mount is not None:
            self.mount.close()


def set_size(fd: int, rows: int, columns: int) -> None:
    """TIOCSWINSZ without the termios module, which python3-minimal lacks."""
    fcntl.ioctl(fd, _TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def put_file(path: str, content: bytes, mode: int, uid: int, gid: int) -> None:
    """Write a file for the job, with the folders above it."""
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    temporary = "%s.wnodes-%d" % (path, os.getpid())
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        if uid >= 0:
            os.fchown(fd, uid, gid)
    finally:
        os.close(fd)
    os.rename(temporary, path)


def put_files(files: list[dict[str, Any]], uid: int = -1, gid: int = -1) -> None:
    """Write the files that a request carries (``content`` in base64)."""
    for file in files:
        content = binascii.a2b_base64(file["content"])
        put_file(file["path"], content, int(file.get("mode", 0o600)), file.get("uid", uid), file.get("gid", gid))


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, _SETPIPE, 1 << 20)
    except OSError:
        pass  # a user's pipe quota never applies to root; smaller pipes work too
    return reader, writer


def _streams(args: dict[str, Any]) -> tuple[list[int], dict[int, int], int]:
    """(the command's fds 0-2 or -1, our ends by sub, terminal master or -1)."""
    closed = args.get("closed", ())
    if args.get("tty"):
        master, slave = os.openpty()
        set_size(master, args["tty"]["rows"], args["tty"]["cols"])
        return [slave, slave, slave], {0: os.dup(master), 1: os.dup(master)}, master
    theirs, ours = args.get("fds") or [-1, -1, -1], {}
    if args.get("port"):
        theirs[0] = guest_mounts.open_port(args["port"])
        theirs[1] = os.dup(theirs[0])
    for sub in (0, 1, 2):
        if sub not in closed and theirs[sub] < 0 and not args.get("fds"):
            reader, writer = _pipe()
            theirs[sub], ours[sub] = (reader, writer) if sub == 0 else (writer, reader)
    return theirs, ours, -1


def spawn(link: pump.Link, stream: int, args: dict[str, Any]) -> Command:
    """Start a command; its streams flow as soon as there is credit.

    Raises OSError with what could not be done (a missing program, folder).
    """
    put_files(args.get("files", []), args.get("uid", -1), args.get("gid", -1))
    theirs, ours, master = _streams(args)
    mount = None
    try:
        mount = guest_mounts.Awaited(**args["mount"]) if args.get("mount") else None
        pid = guest_spawn.spawn(args, theirs) if guest_spawn.suits(args, theirs) else _fork(args, theirs)
    except BaseException:
        for fd in list(ours.values()) + ([master] if master >= 0 else []):
            os.close(fd)
        if mount is not None:
            mount.close()
        raise
    finally:
        for fd in set(theirs) - {-1}:
            os.close(fd)
    command = Command(stream, pid, _flow(link, stream, args, ours), master)
    command.linger = bool(args.get("linger"))
    command.mount = mount
    return command


def _fork(args: dict[str, Any], theirs: list[int]) -> int:
    told, tell = os.pipe()  # closed by a successful exec
    pid = os.fork()
    if pid == 0:
        _become(args, theirs, tell)
    os.close(tell)
    problem = os.read(told, 4096)
    os.close(told)
    if problem:
        os.waitpid(pid, 0)
        number, _, what = problem.decode("utf-8", "surrogateescape").partition(" ")
        raise OSError(int(number), os.strerror(int(number)), what)
    return pid


def _flow(link: pump.Link, stream: int, args: dict[str, Any], ours: dict[int, int]) -> pump.Flow:
    for fd in ours.values():
        os.set_blocking(fd, False)
    window = int(args.get("window", frames.WINDOW))
    sinks = {0: pump.Sink(ours[0], frames.STDIN_WINDOW)} if 0 in ours else {}
    sources = {sub: pump.Source(fd, window) for sub, fd in ours.items() if sub}
    return pump.Flow(link, stream, sources, sinks)


def _become(args: dict[str, Any], theirs: list[int], tell: int) -> None:
    """In the child: become the command, or tell why not. Never returns."""
    step = "setup"
    try:
        os.setsid()
        if args.get("tty"):
            fcntl.ioctl(theirs[0], _TIOCSCTTY, 0)
        _place(theirs, tell)
        _reset_signals(args.get("ignored", ()))
        step = "resource limits"
        _limit(args.get("rlimits") or {})
        step = "user"
        if "groups" in args and os.getuid() == 0:
            os.setgroups(args["groups"])
        if args.get("gid", -1) >= 0:
            os.setgid(args["gid"])
        if args.get("uid", -1) >= 0:
            os.setuid(args["uid"])
        os.umask(int(args.get("umask", 0o022)))
        step = args["cwd"]
        os.chdir(step)
        step = args["argv"][0]
        _exec(args.get("program") or step, args["argv"], args["environ"])
    except OSError as error:
        os.write(tell, ("%d %s" % (error.errno or 5, step)).encode("utf-8", "surrogateescape"))
    except BaseException as error:  # noqa: BLE001 - nothing of the agent may run on in the child
        os.write(tell, ("22 %s: %s" % (step, error)).encode("utf-8", "replace"))
    finally:
        os._exit(127)


def _exec(name: str, argv: list[str], environ: dict[str, str]) -> None:
    """execvpe(3); os.execvpe would import a module in each child, 20 ms under TCG. Raises OSError."""
    if "/" in name:
        os.execve(name, argv, environ)
    problem: OSError = FileNotFoundError(2, "")
    for folder in environ.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":"):
        try:
            os.execve((folder or ".") + "/" + name, argv, environ)
        except OSError as error:
            if error.errno not in (2, 20):  # ENOENT, ENOTDIR: the next folder may have it
                problem = error
    raise problem


def _place(theirs: list[int], tell: int) -> None:
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) if fd >= 0 else -1 for fd in theirs]
    for sub, fd in enumerate(high):
        if fd >= 0:
            os.dup2(fd, sub)
            os.close(fd)
        elif sub != tell:
            try:
                os.close(sub)
            except OSError:
                pass


def _reset_signals(ignored: list[int]) -> None:
    """Ignore what the caller ignores, and no more: Python itself ignores PIPE and XFSZ.

    Handlers end with exec; signals that the agent was born ignoring were reset at its start.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    for number in ignored:
        if number not in _NEVER_KEPT:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _limit(limits: dict[str, list[int]]) -> None:
    """Set limits given as {"nofile": [soft, hard]}, -1 for unlimited; without ``resource``, by prlimit(1)."""
    if not limits:
        return
    with open("/proc/sys/fs/nr_open", "rb") as file:
        most = int(file.read())  # of open files; a host may allow more than this kernel can
    limits = {n: [v if n != "nofile" or 0 <= v <= most else most for v in pair] for n, pair in limits.items()}
    try:
        import resource
    except ImportError:
        resource = None  # type: ignore[assignment]
    if resource is not None:
        for name, (soft, hard) in limits.items():
            number = getattr(resource, "RLIMIT_" + name.upper(), None)
            if number is not None:
                resource.setrlimit(number, (soft, hard))
        return
    argv = ["prlimit", "--pid", str(os.getpid())]
    for name, pair in limits.items():
        text = ":".join("unlimited" if value < 0 else str(value) for value in pair)
        argv.append("--%s=%s" % (name, text))
    pid = os.fork()
    if pid == 0:
        try:
            os.execvp(argv[0], argv)
        finally:
            os._exit(127)
    os.waitpid(pid, 0)


def last_pid() -> int:
    """The pid that was given out last."""
    with open("/proc/loadavg", "rb") as file:
        return int(file.read().split()[4])


def session_members(sessions: set[int]) -> list[int]:
    """Pids of the processes of these sessions, background jobs of a shell among them."""
    found: list[int] = []
    if not sessions:
        return found
    oldest = min(sessions)
    # Reading all of /proc takes 50 ms under TCG. A session's members are younger than its
    # leader, so that their pids are higher, unless pids have wrapped round since.
    if last_pid() < oldest:
        oldest = 1
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) < oldest:
            continue
        try:
            with open("/proc/%s/stat" % name, "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) in sessions:
            found.append(int(name))
    return found
