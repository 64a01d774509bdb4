"""The one door to other programs: argv lists, a deadline, bounded output, a clean environment.

No other module imports ``subprocess`` (tests/test_house.py). Nothing here ever sees a shell.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from wnodes_core.errors import CommandError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_OUTPUT = 16 << 20  # of each stream: some programs run as a user, who can make them print for ever


@dataclass(frozen=True)
class Result:
    """A finished program: its exit code and what it printed."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Its standard output as text; undecodable bytes become replacement signs."""
        return self.stdout.decode(errors="replace")


def clean_environment(keep: Sequence[str] = ()) -> dict[str, str]:
    """A fixed PATH and the C locale, plus the named variables of ours where set."""
    kept = {name: os.environ[name] for name in keep if name in os.environ}
    return {"PATH": PATH, "LC_ALL": "C.UTF-8", **kept}


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 30.0,
    stdin: bytes = b"",
    environ: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: str = "/",
    become: tuple[int, int, Sequence[int]] | None = None,
) -> Result:
    """Run a program to its end.

    ``environ`` None means ``clean_environment()``. ``become`` is (uid, gid, groups) to run as.
    With ``check`` a non-zero exit raises.

    Raises CommandError, also for a missing program, past ``timeout_s`` and past ``MAX_OUTPUT`` (it is killed).
    """
    process = _started(argv, bool(stdin), environ, cwd, become)
    with process:
        try:
            stdout, stderr = _exchange(process, list(argv), stdin, timeout_s)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise CommandError(list(argv), process.returncode, stderr.decode(errors="replace"))
    return Result(tuple(argv), process.returncode, stdout, stderr)


def _started(
    argv: Sequence[str],
    listens: bool,
    environ: Mapping[str, str] | None,
    cwd: str,
    become: tuple[int, int, Sequence[int]] | None,
) -> subprocess.Popen[bytes]:
    uid, gid, groups = become or (None, None, None)
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(clean_environment() if environ is None else environ),
            cwd=cwd,
            user=uid,
            group=gid,
            extra_groups=groups,
            start_new_session=True,
        )
    except OSError as error:
        raise CommandError(list(argv), 127, f"{error.strerror}: {error.filename}") from error


def _exchange(process: subprocess.Popen[bytes], argv: list[str], stdin: bytes, timeout_s: float) -> list[bytes]:
    """Feed a program and collect its output until it ends: no more of it than we can hold."""
    deadline = time.monotonic() + timeout_s
    output = {process.stdout: bytearray(), process.stderr: bytearray()}
    rest = memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        for stream in output:
            selector.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
        if process.stdin:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                raise _too_late(argv, output[process.stderr], timeout_s)
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    rest = _feed(process, selector, rest)
                elif not _collect(key.fd, output[key.fileobj], argv):  # type: ignore[index]
                    selector.unregister(key.fileobj)
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _too_late(argv, output[process.stderr], timeout_s) from None
    return [bytes(data) for data in output.values()]


def _too_late(argv: list[str], stderr: bytearray, timeout_s: float) -> CommandError:
    return CommandError(argv, None, stderr.decode(errors="replace"), timeout_s=timeout_s)


def _collect(fd: int, into: bytearray, argv: list[str]) -> bool:
    data = os.read(fd, 65536)
    if len(into) + len(data) > MAX_OUTPUT:
        raise CommandError(argv, 128 + signal.SIGKILL, f"it printed more than {MAX_OUTPUT} bytes")
    into += data
    return bool(data)


def _feed(process: subprocess.Popen[bytes], selector: selectors.BaseSelector, rest: memoryview) -> memoryview:
    assert process.stdin
    with suppress(BrokenPipeError):
        rest = rest[os.write(process.stdin.fileno(), rest[:4096]) :]  # poll(2): so much never blocks
        if rest:
            return rest
    selector.unregister(process.stdin)  # all is said, or it does not listen
    process.stdin.close()
    return memoryview(b"")


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    environ: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    cwd: str = "/",
    new_session: bool = True,
    before_exec: Callable[[], None] | None = None,
    become: tuple[int, int, Sequence[int]] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a long-lived helper and return at once; streams default to /dev/null. ``become`` as in ``run``.

    Raises CommandError when it cannot be started.
    """
    uid, gid, groups = become or (None, None, None)
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            env=dict(clean_environment() if environ is None else environ),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=new_session,
            user=uid,
            group=gid,
            extra_groups=groups,
            preexec_fn=before_exec,
        )
    except OSError as error:
        raise CommandError(list(argv), 127, f"{error.strerror}: {error.filename}") from error
