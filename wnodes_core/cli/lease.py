"""``wnodes lease``: the VMs of running jobs on this node, for their owners and for root."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from typing import Any

from wnodes_core.cli import leases, output, parsers, waterfall
from wnodes_core.errors import RequestError
from wnodes_core.trace import took

_TRACE = """\
Draw the start of a lease's VM, running or ended, as a waterfall: for each phase when it began (seconds from
LAUNCH called, the moment in which the batch system started the task or the shell started 'wnodes run'), how
long it took, and a bar. The axis ends with the user's first instruction; phases may overlap.

The first line says how the VM came up: 'cold' (booted), 'warm' (cloned for this job) or 'pool' (cloned before
it came); which way and from which template; after 'no clone' the kind of error that made it a boot instead.

  admit     wnodesd checks the request (before LAUNCH)    overlay   the disk's copy-on-write layer
  image     the image comes to this node                  define    libvirt starts QEMU, to boot
  launcher  our program in front of the task starts       boot      the guest's kernel, to our agent's answer
  lease     wnodesd grants the lease                      clone     QEMU starts as a copy of the template
  template  'wnodes run' looks for a template             wake      the copy answers, with its own identity
  keeper    the VM's own process starts                   agent     user, groups and host name in the guest
                                                          mount     the job's files
  first instruction   the command starts in the guest     run, teardown   what follows"""
_STATES = {"running": "green", "failed": "red", "ending": "yellow", "over": "dim"}


def add_parser(subparsers: Any) -> None:
    """Add ``lease`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "lease",
        None,
        about=parsers.COMMANDS["lease"][1],
        text="A lease is one job's claim on one VM. Root sees all leases of this node, a user their own,\n"
        "those of 'wnodes run' without wnodesd among them. LEASE is an id, its beginning, or a job id.",
        examples="""
        wnodes lease list
        wnodes lease trace 1234        # where the start of job 1234's VM spent its time
        wnodes lease console -f 1234   # watch its serial console
        wnodes lease release 1234 --yes""",
    )
    group = parsers.add_group(parser)
    _add_looking(group)
    _add_console(group)
    _add_release(group)


def _add_looking(group: Any) -> None:
    listing = _add(
        group,
        "list",
        _list,
        "list the leases",
        "List the leases on this node, oldest first.",
        "wnodes lease list --json\nwnodes lease list --ended",
    )
    listing.add_argument("--ended", action="store_true", help="also those that are over")
    _add(group, "show", _show, "show all that is known of a lease", "Show one lease in full.", "wnodes lease show 1234")
    _add(
        group,
        "trace",
        _trace,
        "draw how long each phase of a start took",
        _TRACE,
        "wnodes lease trace 1234\nwnodes lease trace               # the only VM here, or the last that ended\n"
        "wnodes lease trace 1234 --json | jq '.seconds'",
    )


def _add_console(group: Any) -> None:
    console = _add(
        group,
        "console",
        _console,
        "print the VM's serial console",
        "Print what the guest wrote to its serial console (kernel messages, boot failures). Control characters\n"
        "are shown, not obeyed.",
        "wnodes lease console 1234\nwnodes lease console -n 20 -f 1234  # and go on until the VM is gone",
    )
    console.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the VM is gone")
    console.add_argument("-n", "--lines", type=_count, metavar="N", help="only the last N lines of what is there")


def _add_release(group: Any) -> None:
    release = _add(
        group,
        "release",
        _release,
        "end a lease: the VM is gone, the job fails",
        "End a lease at once. What ran in the VM is lost and the job's command fails; the job itself is the\n"
        "batch system's to cancel. Asks first on a terminal.",
        "wnodes lease release 1234\nwnodes lease release slurm-n0-1234-ab12cd --yes",
    )
    release.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _add(group: Any, name: str, handler: parsers.Handler, about: str, text: str, examples: str) -> Any:
    parser = parsers.add_command(group, name, handler, about=about, text=text, examples=examples)
    if name != "list":
        optional: dict[str, Any] = {"nargs": "?", "default": ""} if name == "trace" else {}
        parser.add_argument("lease", metavar="LEASE", help="lease id, its beginning, or a job id", **optional)
    if name != "console":
        parsers.add_json(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: want a whole number from 0")
    return int(text)


def _list(args: argparse.Namespace) -> int:
    found = leases.all_leases(ended=args.ended)
    if args.json:
        output.print_json([{key: lease[key] for key in leases.KEYS} for lease in found])
        return 0
    now = time.time()
    rows = [
        (each["id"], _job(each), each["user"], each["image"], each["state"], output.age(now - each["since"]))
        for each in found
    ]
    output.print_table(["LEASE", "JOB", "USER", "IMAGE", "STATE", "AGE"], rows, right=[5])
    return 0


def _job(lease: leases.Lease) -> str:
    return f"{lease['lrms']}:{lease['job_id']}" if lease["origin"] == "wnodesd" else "-"


def _show(args: argparse.Namespace) -> int:
    lease = leases.one_lease(args.lease)
    if args.json:
        output.print_json(lease)
        return 0
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease["since"]))
    shown = {**lease, "since": f"{since} ({output.age(time.time() - lease['since'])} ago)"}
    shown["state"] = output.paint(output.clean(lease["state"]), _STATES.get(lease["state"], "bold"))
    steps = waterfall.steps_of(lease["trace"])
    shown["start"] = waterfall.title(waterfall.start_of(lease["start"]), steps) if steps else ""
    shown["trace"] = f"{len(steps)} phases" if steps else ""
    for key, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value not in ("", None):
            print(f"{key:<13} {value if key == 'state' else output.clean(value)}")
    return 0


def _trace(args: argparse.Namespace) -> int:
    lease = leases.one_lease(args.lease)
    steps, start = waterfall.steps_of(lease["trace"]), waterfall.start_of(lease["start"])
    if args.json:
        told = {"id": lease["id"], "state": lease["state"], "start": asdict(start), "seconds": round(took(steps), 4)}
        output.print_json({**told, "trace": [step._asdict() for step in steps]})
    elif steps:
        print(waterfall.draw(steps, start, shutil.get_terminal_size().columns))
    else:
        print(f"lease {lease['id']}: no phase has ended yet")
    return 0


def _console(args: argparse.Namespace) -> int:
    from wnodes_core.cli import console

    lease = leases.one_lease(args.lease)
    return console.show(lease["folder"], int(lease["uid"]), lines=args.lines, follow=args.follow)


def _release(args: argparse.Namespace) -> int:
    lease = leases.one_lease(args.lease)
    if lease["state"] == "ended":
        raise RequestError(f"lease {lease['id']}: it has ended already")
    if not args.yes:
        answer = output.confirm(f"End lease {lease['id']} of {lease['user']} ({lease['image']}, {lease['state']})?")
        if answer is None:
            raise RequestError(f"lease {lease['id']}: nobody to ask at the terminal", hint="say --yes")
        if not answer:
            print("not released")
            return 1
    pending = _end_embedded(lease) if lease["origin"] == "embedded" else _end_by_daemon(lease)
    if args.json:
        output.print_json({"id": lease["id"], "pending": pending})
    else:
        print(f"{lease['id']}  {'is being released' if pending else 'released'}")
    return 0


def _end_by_daemon(lease: leases.Lease) -> bool:
    from wnodes_core.agent import client

    reply = client.call({"op": "release", "lease": lease["id"]}, path=leases.daemon_socket(), timeout_s=60)
    return bool(reply.get("pending"))


def _end_embedded(lease: leases.Lease) -> bool:
    """Kill the keeper of an embedded run and undo by its journal, as the next run would."""
    from pathlib import Path

    from wnodes_core import embedded, processes
    from wnodes_core.model import Process

    keeper = lease.get("keeper") or {}
    if keeper and not processes.kill(Process(int(keeper["pid"]), 0, int(lease["uid"]), int(keeper["started"]), "", ())):
        raise RequestError(f"lease {lease['id']}: its keeper, process {keeper['pid']}, does not end")
    errors = embedded.undo(Path(lease["folder"]))
    embedded.warn(errors)
    return bool(errors)
