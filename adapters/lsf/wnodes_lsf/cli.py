"""``wnodes lsf install``: prints, checks or writes what turns a queue of LSF into one of VMs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

from wnodes_core.errors import WnodesError
from wnodes_lsf import install

_EXAMPLES = """\
examples:
  wnodes lsf install --dry-run             show every file and line, change nothing
  wnodes lsf install --apply               do it, then badmin reconfig and lsadmin reconfig
  wnodes lsf install --check               name what is missing and why; exit code 1 if anything is
  wnodes lsf install --uninstall           take it out again, the site's own files as they were
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lsf`` to the command ``wnodes``; ``args.func(args)`` gives the exit code."""
    parser = subparsers.add_parser("lsf", help="the LSF adapter: install, check, uninstall")
    actions = parser.add_subparsers(dest="lsf_action", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    action = actions.add_parser("install", help="connect wnodes to this LSF", epilog=_EXAMPLES, formatter_class=raw)
    mode = action.add_mutually_exclusive_group()
    for name, text in (
        ("dry-run", "show what would be written (default)"),
        ("check", "name what is missing and why"),
        ("apply", "write it, idempotently; a backup of lsb.queues stays beside it"),
        ("uninstall", "take it out again"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=text)
    _paths(action)
    action.add_argument("--queue", default="vm", metavar="NAME", help="the queue of VMs (default: %(default)s)")
    action.add_argument("--app", action="append", default=[], metavar="NAME", help="an application profile of VMs")
    action.add_argument("--image", action="append", default=[], metavar="NAME", help="publish img_NAME for it")
    action.add_argument(
        "--no-slots", dest="slots", action="store_false", help="without the resource vmslots and its elim"
    )
    action.add_argument(
        "--generic-esub",
        dest="generic",
        action="store_true",
        help='also esub itself: for LSF without bsub -a "name(args)"',
    )
    action.add_argument(
        "--allow-login-shell",
        dest="login",
        action="store_true",
        help="let bsub -L pass: wrappers of a grid's BLAH have it",
    )
    action.set_defaults(func=run, mode="dry-run")


def _paths(action: argparse.ArgumentParser) -> None:
    serverdir, envdir = os.environ.get("LSF_SERVERDIR", "/usr/share/lsf/etc"), os.environ.get("LSF_ENVDIR", "/etc")
    for name, default, text in (
        ("serverdir", serverdir, "LSF_SERVERDIR"),
        ("queues", f"{envdir}/lsb.queues", "the cluster's lsb.queues"),
        ("prefix", str(install.Site.prefix), "for our scripts"),
        ("run-dir", str(install.Site.run_dir), "wnodesd's"),
    ):
        action.add_argument(
            f"--{name}", type=Path, default=Path(default), metavar="PATH", help=f"{text} (default: %(default)s)"
        )
    action.add_argument("--python", default=sys.executable, help="of our environment (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what ``wnodes lsf install`` was asked for; 0 done or nothing to do, 1 something is missing or failed."""
    try:
        paths = (args.serverdir.absolute(), args.queues.absolute(), args.prefix.absolute(), args.run_dir.absolute())
        words = {"queue": args.queue, "apps": tuple(args.app), "images": tuple(args.image)}
        site = install.Site(*paths, args.python, slots=args.slots, generic=args.generic, login=args.login, **words)
        return {"dry-run": _dry_run, "check": _check, "apply": _apply, "uninstall": _uninstall}[args.mode](site)
    except (WnodesError, OSError) as error:
        print(f"wnodes: {error}", file=sys.stderr)
        return 1


def _dry_run(site: install.Site) -> int:
    for step in install.plan(site):
        if not step.done:
            print(f"# write {step.path}: {step.why}")
            old = step.path.read_text(errors="replace") if step.path.exists() else ""
            print(*difflib.unified_diff(old.splitlines(True), step.text.splitlines(True), n=0), sep="", end="")
    _advise(site)
    return 0


def _check(site: install.Site) -> int:
    missing = [f"{step.path}: {step.why}" for step in install.plan(site) if not step.done]
    for line in missing:
        print(f"missing: {line}")
    if not missing:
        print(f"complete: hooks and queue {site.queue} are as wanted")
    return 1 if missing else 0


def _apply(site: install.Site) -> int:
    steps = [step for step in install.plan(site) if not step.done]
    for step in steps:
        step.apply()
        print(f"wrote {step.path}: {step.why}")
    if not steps:
        print(f"nothing to do: hooks and queue {site.queue} are as wanted")
    _advise(site)
    return 0


def _uninstall(site: install.Site) -> int:
    for line in install.remove(site):
        print(line)
    print(f"removed our files from {site.prefix}")
    return 0


def _advise(site: install.Site) -> None:
    if site.slots or site.images:
        print(install.resource_lines(site), end="")
    for name in site.apps:
        print(f"# lsb.applications, for bsub -app {name}:\n{install.snippet(site, 'Application')}", end="")
    print("# lsf.conf: LSB_SUB_COMMANDNAME=y lets a command hold single quotes")
    print(
        "# then: badmin reconfig; with vmslots: lsadmin reconfig and badmin mbdrestart; the same prefix on every host"
    )
