"""``wnodes run``: one command in a VM of its own, without batch system, daemon or root."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from wnodes_core import embedded, launcher
from wnodes_core.errors import NoProvider, WnodesError
from wnodes_core.files import private_folder
from wnodes_core.guest import client
from wnodes_core.guest.client import Command, Exit
from wnodes_core.model import Image, Job, Mount, Template, Trace, VmRequest

EXAMPLES = """\
examples:
  wnodes run --image debian12 -- uname -a
  wnodes run --image debian12 -it -- bash
  wnodes run --image el9:2026.1 --cpus 2 --memory 4G --mount /data:/data:ro -- ./analyse.sh
  wnodes run --vm image=debian12,memory=2G,trace=yes -- make test
  wnodes run --image debian12 --start warm --trace -- true

The current folder is mounted at the same path in the guest. The exit code is the command's own;
125 means that the VM could not be had or was lost, and the message says why.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``run`` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run a command in its own VM",
        description="Boot a VM from an image, run one command in it as the calling user, remove it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", metavar="NAME", help="image to boot: NAME, NAME:TAG or NAME@sha256:DIGEST")
    parser.add_argument(
        "--vm", metavar="GRAMMAR", default="", help="the whole request in one option, as for a batch job"
    )
    parser.add_argument("--cpus", type=int, metavar="N", help="virtual cpus (default 1)")
    parser.add_argument("--memory", metavar="SIZE", help="guest memory, as in 2G (default 1G)")
    parser.add_argument("--scratch", metavar="SIZE", help="an empty disk for /tmp, /var/tmp and /scratch, as in 20G")
    parser.add_argument("--network", metavar="NAME", help="user: the network as this host sees it (default none)")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="SRC[:DST][:ro]", help="host folder to mount; repeatable"
    )
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="accepted for familiarity; stdin is always connected"
    )
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument("--no-workdir", action="store_true", help="do not mount the current folder")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), help="override the site's accelerator")
    parser.add_argument(
        "--start",
        choices=("auto", "warm", "cold"),
        help="auto: clone a booted guest where one is there; warm: make one for that if need be; cold: boot",
    )
    parser.add_argument("--trace", action="store_true", help="draw the phases of the start on stderr at the end")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARG …]")
    parser.set_defaults(func=run)


def request_of(args: argparse.Namespace) -> VmRequest:
    """The request that the options spell. Raises BadRequest."""
    request = VmRequest.parse(args.vm) if args.vm else VmRequest()
    words = [("image", args.image), ("cpus", args.cpus), ("memory", args.memory), ("scratch", args.scratch)]
    words += [("start", args.start), ("network", args.network)]
    given = [f"{key}={value}" for key, value in words if value is not None]
    if given:
        request = request.merged(VmRequest.parse(",".join(given)))
    mounts = tuple(Mount.parse(text) for text in args.mount)
    return request.merged(VmRequest(mounts=mounts))


def run(args: argparse.Namespace) -> int:
    """Carry the command out; returns only if it could not be."""
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        print("wnodes run: no command: want wnodes run --image NAME -- COMMAND [ARG …]", file=sys.stderr)
        return 2
    closed = client.reserve_stdio()
    # The client gives our stderr up as soon as the command has closed its own.
    told = os.fdopen(os.dup(2), "w") if args.trace else None
    command = launcher.command_of(tuple(words), dict(os.environ))
    if args.tty and not command.tty:
        print("wnodes run: -t needs a terminal on stdin and stdout", file=sys.stderr)
        return 2
    try:
        embedded.warn(embedded.sweep())
        end, trace = _run_in_vm(args, command, closed)
    except WnodesError as error:
        launcher.refuse(error)
    if told:
        print(f"wnodes: {trace}", file=told, flush=True)
    return launcher.finish(command, end)


def _run_in_vm(args: argparse.Namespace, command: Command, closed: tuple[int, ...]) -> tuple[Exit, str]:
    from wnodes_core import settings as settings_module

    waiting = launcher.ready_keeper(leave_family=False)
    settings = settings_module.load()
    progress = (lambda text: None) if args.quiet else client.show_progress
    lease, folder = embedded.new_lease()
    pid = 0
    trace = Trace(origin=launcher.process_began())
    try:
        job = embedded.own_job(lease, work_dir="" if args.no_workdir else command.cwd)
        with _image_and_plan(args, settings, job, folder, trace, progress) as plan:
            given = {"plan": plan, "disabled": list(settings.plugins.disabled), "launcher": os.getpid()}
            given["trace"] = trace.to_dict()
            pid = launcher.start_keeper(given, leave_family=False, waiting=waiting)
            gone = partial(launcher.keeper_gone, pid)
            end = client.run(f"{folder}/keeper.sock", command, closed=closed, progress=progress, gone=gone)
            drawn = _drawn(folder) if args.trace else ""
    finally:
        embedded.warn(embedded.wait_for_keeper(pid, folder) if pid else embedded.undo(Path(folder)))
    return end, drawn


@contextmanager
def _image_and_plan(
    args: argparse.Namespace, settings: Any, job: Job, folder: str, trace: Trace, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The plan, with its image held against a purge for as long as the block runs."""
    from wnodes_core import plan, policy
    from wnodes_core.images import layers, use
    from wnodes_core.images.progress import Bar
    from wnodes_core.plugins import Plugins

    hook = Plugins(disabled=settings.plugins.disabled).hook
    request = policy.admit(request_of(args), job, settings, hook)
    accel = _accel(args.accel or settings.accel, settings, hook, progress)
    trace.catch_up("launcher")
    stores = layers.open_stores(settings, hook)
    entry = stores.resolve(request.image)
    with closing(Bar(f"image {entry}", delay_s=1e9 if args.quiet else 1.0)) as bar:
        image = stores.ensure(entry, bar, time.monotonic() + settings.images.fetch_timeout_s)
    with use.hold(image.path):
        trace.catch_up("image")
        template = _template(request, job, image, settings, accel, hook, progress)
        trace.catch_up("template")
        where = {"lease": os.path.basename(folder), "folder": folder}
        yield plan.make(request, job, image, settings, accel, template=template, **where)


def _template(
    request: VmRequest, job: Job, image: Image, settings: Any, accel: str, hook: Any, progress: Callable[[str], None]
) -> Template | None:
    from wnodes_core import plan
    from wnodes_core.templates.choose import Chooser, Size

    size = Size.of(request, job.cpus, plan.guest_memory_mib(request, job, settings, accel))
    return Chooser(settings, hook).clone_or_none(request, image, accel, size, progress)


def _accel(wanted: str, settings: Any, hook: Any, progress: Callable[[str], None]) -> str:
    folder = private_folder(f"{embedded.leases_root()}/.probe")
    found = hook.wnodes_vm_probe(accel=wanted, folder=str(folder))
    if found is None:
        raise NoProvider("no hypervisor backend is installed", hint="wnodes doctor")
    if found.get("notice"):
        progress(found["notice"])
    return str(found["accel"])


def _drawn(folder: str, wait_s: float = 0.5) -> str:
    """The trace as the keeper has it; it may write down the command's end a moment after us."""
    from wnodes_core.cli import waterfall

    deadline = time.monotonic() + wait_s
    steps, start = waterfall.steps_of([]), waterfall.start_of({})
    while time.monotonic() < deadline and not any(step.name == "run" for step in steps):
        with suppress(OSError, ValueError):
            told = json.loads((Path(folder) / "lease.json").read_text())
            steps, start = waterfall.steps_of(told.get("trace")), waterfall.start_of(told.get("start"))
        time.sleep(0.01)
    return waterfall.draw(steps, start, shutil.get_terminal_size().columns)
