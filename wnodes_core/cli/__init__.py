"""The ``wnodes`` command. Only the subcommand that was typed is imported: ``--version`` is quick.

Exit codes: 0 done, 1 an error to be looked at (verdict HOLD), 2 wrong usage, 69 this node cannot
(DRAIN), 70 a bug of ours, 75 try again later (REQUEUE), 130 interrupted, 141 nobody reads our
output. ``wnodes run`` ends as the command in the guest did, or with 125.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from wnodes_core.errors import Verdict, WnodesError

if TYPE_CHECKING:
    import argparse

EXIT_CODES = {Verdict.HOLD: 1, Verdict.REQUEUE: 75, Verdict.DRAIN: 69}  # sysexits.h: TEMPFAIL, UNAVAILABLE
USAGE, BUG, INTERRUPTED, NOBODY_READS = 2, 70, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``wnodes`` command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        return _guarded(_version)
    return _guarded(lambda: _run(words))


def _version() -> int:
    from wnodes_core import __version__

    print(f"wnodes {__version__}")
    return 0


def _run(words: list[str]) -> int:
    from wnodes_core.cli import parsers

    parser = parsers.build(words)
    args: argparse.Namespace = parser.parse_args(words)
    return int(args.func(args) or 0)


def _guarded(work: Callable[[], int]) -> int:
    """Every way a command can end, as an exit code and at most two lines on stderr."""
    try:
        code = work()
        sys.stdout.flush()
    except WnodesError as error:
        _tell("error", error)
        return EXIT_CODES[error.verdict]
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NOBODY_READS
    except Exception as error:  # noqa: BLE001 - the command line's own net: a bug is told, not dumped
        _tell("bug", error)
        return BUG
    return code


def _tell(kind: str, error: Exception) -> None:
    if os.environ.get("WNODES_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    from wnodes_core.cli.output import clean, paint

    message = error.message if isinstance(error, WnodesError) else f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, WnodesError) else "run it again with WNODES_DEBUG=1 and report the output"
    message, hint = clean(message, keep="\n\t"), clean(hint, keep="\n\t")
    print(f"wnodes: {paint(kind, 'red', sys.stderr)}: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
