"""``wnodes slurm install``: prints, checks or writes the few lines that turn a Slurm into one with VMs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

from wnodes_core.errors import WnodesError
from wnodes_slurm import install

_EXAMPLES = """\
examples:
  wnodes slurm install --dry-run           show every file and line, change nothing
  wnodes slurm install --apply             do it, then restart slurmd and scontrol reconfigure
  wnodes slurm install --check             name what is missing and why; exit code 1 if anything is
  wnodes slurm install --uninstall         take it out again, the site's own lines as they were
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``slurm`` to the command ``wnodes``; ``args.func(args)`` gives the exit code."""
    parser = subparsers.add_parser("slurm", help="the Slurm adapter: install, check, uninstall")
    actions = parser.add_subparsers(dest="slurm_action", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    action = actions.add_parser("install", help="connect wnodes to this Slurm", epilog=_EXAMPLES, formatter_class=raw)
    mode = action.add_mutually_exclusive_group()
    for name, text in (
        ("dry-run", "show what would be written (default)"),
        ("check", "name what is missing and why"),
        ("apply", "write it, idempotently; a backup of each .conf stays beside it"),
        ("uninstall", "take it out again"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=text)
    conf = os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")
    action.add_argument("--slurm-conf", type=Path, default=Path(conf), metavar="PATH", help="(default: %(default)s)")
    action.add_argument("--prefix", type=Path, default=install.Site.prefix, help="(default: %(default)s)")
    action.add_argument("--run-dir", type=Path, default=install.Site.run_dir, help="wnodesd's (default: %(default)s)")
    action.add_argument("--python", default=sys.executable, help="of our environment (default: %(default)s)")
    action.add_argument("--image", action="append", default=[], help="also print node features for this image")
    action.set_defaults(func=run, mode="dry-run")
    lua = actions.add_parser("job-submit", help="print a job_submit.lua that refuses a bad request at submission")
    lua.set_defaults(func=lambda _: print((install.HERE / "hooks" / "job_submit.lua").read_text(), end="") or 0)


def run(args: argparse.Namespace) -> int:
    """Do what ``wnodes slurm install`` was asked for; 0 done or nothing to do, 1 something is missing or failed."""
    try:
        site = install.Site(args.slurm_conf.absolute(), args.prefix.absolute(), args.run_dir.absolute(), args.python)
        return {"dry-run": _dry_run, "check": _check, "apply": _apply, "uninstall": _uninstall}[args.mode](site, args)
    except (WnodesError, OSError) as error:
        print(f"wnodes: {error}", file=sys.stderr)
        return 1


def _dry_run(site: install.Site, args: argparse.Namespace) -> int:
    if not install.built(site):
        print(f"# build {site.library} with gcc for Slurm {install.slurm_version(site)}")
    for step in install.plan(site):
        if step.done:
            continue
        print(f"# {'link' if step.link else 'write'} {step.path}: {step.why}")
        print(f"{step.path} -> {step.text}" if step.link else _difference(step), end="\n" if step.link else "")
    _advise(args)
    return 0


def _difference(step: install.Step) -> str:
    old = step.path.read_text() if step.path.exists() else ""
    lines = difflib.unified_diff(old.splitlines(True), step.text.splitlines(True), str(step.path), str(step.path), n=0)
    return "".join(lines)


def _check(site: install.Site, args: argparse.Namespace) -> int:
    missing = [f"{step.path}: {step.why}" for step in install.plan(site) if not step.done]
    if not install.built(site):
        missing.insert(0, f"{site.library}: not built for Slurm {install.slurm_version(site)}: jobs would be refused")
    for line in missing:
        print(f"missing: {line}")
    if not missing:
        print("complete: hooks, SPANK plug-in and slurm.conf are as wanted")
    return 1 if missing else 0


def _apply(site: install.Site, args: argparse.Namespace) -> int:
    steps = [step for step in install.plan(site) if not step.done]
    if not install.built(site):
        install.build(site)
        print(f"built {site.library}")
    for step in steps:  # slurm.conf is the last: what it names is there before
        step.apply()
        print(f"wrote {step.path}: {step.why}")
    if not steps:
        print("nothing to do: hooks, SPANK plug-in and slurm.conf are as wanted")
    _advise(args)
    return 0


def _uninstall(site: install.Site, args: argparse.Namespace) -> int:
    for step in install.plan(site):
        if step.link and step.path.is_symlink() and os.readlink(step.path) == step.text:
            step.path.unlink()
    for step in install.removal(site):
        if not step.done:
            step.apply()
            print(f"restored {step.path}")
    install.remove_prefix(site)
    print(f"removed our files from {site.prefix}")
    return 0


def _advise(args: argparse.Namespace) -> None:
    print("# then, on every node: install the same prefix, restart slurmd; on the controller: scontrol reconfigure")
    if args.image:
        features = ",".join(["vm", *(f"vm_{name}" for name in args.image)])
        print(f"# for --constraint=vm_NAME add to each NodeName line: Feature={features}")
    print("# for a refusal at submission: wnodes slurm job-submit > job_submit.lua, JobSubmitPlugins=lua")
