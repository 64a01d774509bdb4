"""``wnodes htcondor install``: prints, checks or writes the few files that turn an HTCondor into one with VMs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from wnodes_core.errors import WnodesError
from wnodes_htcondor import install

_EXAMPLES = """\
examples:
  wnodes htcondor install --dry-run                    show every file, change nothing
  wnodes htcondor install --apply --role execute       an execution point; then condor_restart -startd
  wnodes htcondor install --apply --role submit        an access point; then condor_reconfig
  wnodes htcondor install --check                      name what is missing and why; exit code 1 if anything is
  wnodes htcondor install --uninstall                  take it out again
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``htcondor`` to the command ``wnodes``; ``args.func(args)`` gives the exit code."""
    parser = subparsers.add_parser("htcondor", help="the HTCondor adapter: install, check, uninstall")
    actions = parser.add_subparsers(dest="htcondor_action", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    action = actions.add_parser(
        "install", help="connect wnodes to this HTCondor", epilog=_EXAMPLES, formatter_class=raw
    )
    mode = action.add_mutually_exclusive_group()
    for name, text in (
        ("dry-run", "show what would be written (default)"),
        ("check", "name what is missing and why, and what of the site's harms its jobs"),
        ("apply", "write it, idempotently"),
        ("uninstall", "take it out again"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=text)
    action.add_argument("--role", choices=("execute", "submit", "both"), default="both", help="(default: %(default)s)")
    action.add_argument("--prefix", type=Path, default=install.Site.prefix, help="(default: %(default)s)")
    action.add_argument("--run-dir", type=Path, default=install.Site.run_dir, help="wnodesd's (default: %(default)s)")
    action.add_argument("--python", default=sys.executable, help="of our environment (default: this one)")
    action.add_argument("--vms", type=int, default=0, metavar="N", help="VMs this host may run (default: its cpus)")
    action.set_defaults(func=run, mode="dry-run")


def run(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> int:
    """Do what was asked for; 0 done or nothing to do, 1 something is missing or failed."""
    roles = ("execute", "submit") if args.role == "both" else (args.role,)
    try:
        config, version = install.ask(environ)
        where = (args.prefix.absolute(), args.run_dir.absolute(), args.python)
        site = install.Site(config, version, *where, roles, args.vms or os.cpu_count() or 1)
        code = {"dry-run": _dry_run, "check": _check, "apply": _apply, "uninstall": _uninstall}[args.mode](site)
        for text in install.warnings(site):
            print(f"warning: {text}", file=sys.stderr)
        return code
    except (WnodesError, OSError) as error:
        print(f"wnodes: {error}", file=sys.stderr)
        return 1


def _dry_run(site: install.Site) -> int:
    for step in install.plan(site):
        if not step.done:
            print(f"# write {step.path}: {step.why}")
            old = step.path.read_text() if step.path.exists() else ""
            lines = old.splitlines(True), step.text.splitlines(True)
            print("".join(difflib.unified_diff(*lines, str(step.path), str(step.path), n=0)), end="")
    _advise(site)
    return 0


def _check(site: install.Site) -> int:
    missing = [step for step in install.plan(site) if not step.done]
    for step in missing:
        print(f"missing: {step.path}: {step.why}")
    overridden = install.overridden(site)
    for text in overridden:
        print(f"overridden: {text}")
    if not missing and not overridden:
        print("complete: hooks and configuration are as wanted")
    return 1 if missing or overridden else 0


def _apply(site: install.Site) -> int:
    steps = [step for step in install.plan(site) if not step.done]
    for step in steps:
        step.apply()
        print(f"wrote {step.path}: {step.why}")
    if not steps:
        print("nothing to do: hooks and configuration are as wanted")
    _advise(site)
    return 0


def _uninstall(site: install.Site) -> int:
    for path in install.remove(site):
        print(f"removed {path}")
    _advise(site)
    return 0


def _advise(site: install.Site) -> None:
    if "execute" in site.roles:
        print("# then: condor_restart -startd (the startd tries its container runtime only when it starts)")
    if "submit" in site.roles:
        print("# then: condor_reconfig")
