"""Running a hook: fork, become, exec, wait - without any module that would tidy up behind LSF's back."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Mapping, Sequence

SAFE_PATH = "/bin:/usr/bin:/sbin:/usr/sbin"  # of PRE_EXEC and POST_EXEC (D/T)


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: bytes = b"",
    cwd: str = "/tmp",
    capture: bool = False,
    stderr: int | None = None,
    own_group: bool = True,
) -> tuple[int, bytes]:
    """Run a program and wait for it: its raw wait(2) status and what it printed, if captured.

    stdin is a pipe if there is data, else /dev/null; stdout and stderr go to /dev/null unless asked for.
    """
    feed_r, feed_w = os.pipe()
    out_r, out_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become(argv, environ, cwd, (feed_r if stdin else -1, out_w if capture else -1, stderr), own_group)
        finally:
            os._exit(127)
    os.close(feed_r)
    os.close(out_w)
    output = _exchange(feed_w, out_r, stdin)
    return os.waitpid(pid, 0)[1], output


def _become(
    argv: Sequence[str], environ: Mapping[str, str], cwd: str, stdio: tuple[int, int, int | None], own_group: bool
) -> None:
    if own_group:
        os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    stdin, stdout, stderr = stdio
    os.dup2(stdin if stdin >= 0 else null, 0)
    os.dup2(stdout if stdout >= 0 else null, 1)
    if stderr is None:
        os.dup2(null, 2)
    os.closerange(3, 256)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR2, signal.SIGTSTP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(cwd)
    os.execve(argv[0], list(argv), dict(environ))


def _exchange(feed: int, out: int, data: bytes) -> bytes:
    """Write its stdin and read its stdout at once, so that neither pipe's size matters (1 MB passed intact: T)."""
    collected, rest = [], memoryview(data)
    os.set_blocking(feed, False)
    if not rest:
        os.close(feed)
        feed = -1
    sources = [out]
    while sources or feed >= 0:
        readable, writable, _ = select.select(sources, [feed] if feed >= 0 else [], [])
        if writable:
            rest = _feed(feed, rest)
            if not rest:
                os.close(feed)
                feed = -1
        if readable:
            piece = os.read(out, 65536)
            sources = sources if piece else []
            collected.append(piece)
    os.close(out)
    return b"".join(collected)


def _feed(feed: int, rest: memoryview) -> memoryview:
    try:
        return rest[os.write(feed, rest) :]
    except BrokenPipeError:
        return rest[:0]


def shell(line: str, environ: Mapping[str, str]) -> int:
    """A configured command line: ``/bin/sh -c`` in /tmp, stdio /dev/null, the safe PATH (D/T); its raw status."""
    return run(["/bin/sh", "-c", line], {**environ, "PATH": SAFE_PATH})[0]
