"""The one door to other programs: argv lists, a deadline, bounded output, a clean environment.

No other module imports ``subprocess`` (tests/test_house.py). Nothing here ever sees a shell.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wnodes_core.errors import CommandError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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

    Raises CommandError, also for a missing program and past ``timeout_s`` (it is killed).
    """
    uid, gid, groups = become or (None, None, None)
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env=dict(clean_environment() if environ is None else environ),
            cwd=cwd,
            user=uid,
            group=gid,
            extra_groups=groups,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        tail = (error.stderr or b"").decode(errors="replace")
        raise CommandError(list(argv), None, tail, timeout_s=timeout_s) from error
    except OSError as error:
        raise CommandError(list(argv), 127, f"{error.strerror}: {error.filename}") from error
    result = Result(tuple(argv), done.returncode, done.stdout, done.stderr)
    if check and done.returncode:
        raise CommandError(list(argv), done.returncode, done.stderr.decode(errors="replace"))
    return result


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
) -> subprocess.Popen[bytes]:
    """Start a long-lived helper and return at once; streams default to /dev/null.

    Raises CommandError when it cannot be started.
    """
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
            preexec_fn=before_exec,
        )
    except OSError as error:
        raise CommandError(list(argv), 127, f"{error.strerror}: {error.filename}") from error
