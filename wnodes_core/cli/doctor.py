"""``wnodes doctor``: every check with what was seen and what to do."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from wnodes_core import doctor
from wnodes_core.cli import output, parsers
from wnodes_core.doctor_finding import State

_COLOURS = {State.OK: "green", State.NOTICE: "yellow", State.PROBLEM: "red"}


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "doctor",
        _doctor,
        about=parsers.COMMANDS["doctor"][1],
        text="Check what a worker node needs: a KVM that really runs a guest, QEMU and libvirt, gateways, room,\n"
        "cgroups, settings, wnodesd, adapters. Run it as root for the node's own view, as a user for the view of\n"
        "that user's VMs. The first run may take some seconds. Exit code 1 if there is a problem.",
        examples="""
        wnodes doctor
        wnodes doctor --problems   # only what needs attention
        wnodes doctor --json""",
    )
    parser.add_argument("--problems", action="store_true", help="leave out what is all right")
    parsers.add_json(parser)


def _doctor(args: argparse.Namespace) -> int:
    findings = doctor.examine()
    shown = [one for one in findings if not args.problems or one.state is not State.OK]
    if args.json:
        output.print_json([asdict(one) for one in shown])
    else:
        wide = max((len(one.name) for one in shown), default=0)
        for one in shown:
            word = output.paint(f"{one.state:<7}", _COLOURS[one.state])
            print(f"{word}  {one.name:<{wide}}  {output.clean(one.seen)}")
            if one.advice:
                print(f"{'':<{wide + 11}}-> {output.clean(one.advice)}")
    return int(any(one.state is State.PROBLEM for one in findings))
