"""``wnodes template``: guests that were booted once and are cloned for jobs: the node's, or a user's own."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

from wnodes_core.cli import output, parsers
from wnodes_core.errors import LimitExceeded, RequestError
from wnodes_core.model import ImageRef, parse_size_mib


def add_parser(subparsers: Any) -> None:
    """Add ``template`` to the command line."""
    parser = parsers.add_command(
        subparsers,
        "template",
        None,
        about=parsers.COMMANDS["template"][1],
        text="A template is a guest that was booted once, brought to rest and saved. VMs are cloned from it in a\n"
        "fraction of a second. wnodesd makes templates by itself (settings: warm.build); root sees and keeps\n"
        "the node's, a user those of 'wnodes run'.",
        examples="""
        wnodes template build debian12   # now, and not after the first cold start
        wnodes template list
        wnodes template remove --all     # they are made anew when they are wanted""",
    )
    group = parsers.add_group(parser)
    listing = parsers.add_command(
        group, "list", _list, about="list the templates", text="List the templates, the last used first.",
        examples="wnodes template list --json",
    )  # fmt: skip
    parsers.add_json(listing)
    _add_build(group)
    remove = parsers.add_command(
        group, "remove", _remove, about="throw templates away",
        text="Throw templates away. Clones that run go on; the next start of their kind is a boot.",
        examples="wnodes template remove bc2b2d4d-84d74724139bbcac\nwnodes template remove --all",
    )  # fmt: skip
    remove.add_argument("template", nargs="*", metavar="ID", help="ids, or their beginnings")
    remove.add_argument("--all", action="store_true", help="all of them")


def _add_build(group: Any) -> None:
    build = parsers.add_command(
        group, "build", _build, about="build a template of an image",
        text="Boot a guest of the image, bring it to rest and save it, unless that was done. Takes as long as a cold\n"
        "start and a little. Its clones can have this memory and any larger one, and exactly these cpus.",
        examples="wnodes template build debian12\nwnodes template build el9:2026.1 --cpus 4",
    )  # fmt: skip
    build.add_argument("image", metavar="IMAGE", help="NAME, NAME:TAG or NAME@sha256:DIGEST")
    build.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual cpus of its clones (default 1)")
    build.add_argument("--memory", metavar="SIZE", help="the least memory of its clones (default 512M)")


def _list(args: argparse.Namespace) -> int:
    kept = _chooser().shelf.all()
    if args.json:
        output.print_json([{**asdict(each.template), "used": each.used, "mib": each.mib} for each in kept])
        return 0
    names = _names()
    rows = [
        (
            each.template.id,
            names.get(each.template.image, each.template.image[7:19]),
            each.template.way,
            each.template.accel,
            each.template.shape.cpus,
            _memory(each.template.shape.memory_mib, each.template.shape.most_mib),
            output.size(each.mib << 20),
            output.age(time.time() - each.used),
        )
        for each in kept
    ]
    output.print_table(["TEMPLATE", "IMAGE", "WAY", "ACCEL", "CPUS", "MEMORY", "DISK", "USED"], rows, right=[4, 6])
    return 0


def _memory(base_mib: int, most_mib: int) -> str:
    base = output.size(base_mib << 20)
    return f"{base} to {output.size(most_mib << 20)}" if most_mib > base_mib else base


def _build(args: argparse.Namespace) -> int:
    from wnodes_core import embedded, settings
    from wnodes_core.files import private_folder
    from wnodes_core.images import layers
    from wnodes_core.images.progress import Bar
    from wnodes_core.plugins import Plugins
    from wnodes_core.templates.choose import Chooser, Size

    site = settings.load()
    hook = Plugins(disabled=site.plugins.disabled).hook
    stores = layers.open_stores(site, hook)
    entry = stores.resolve(ImageRef.parse(args.image))
    bar = Bar(f"image {entry}", delay_s=1.0)
    image = stores.ensure(entry, bar, time.monotonic() + site.images.fetch_timeout_s)
    bar.close()
    folder = private_folder(f"{embedded.leases_root()}/.probe")
    accel = str(hook.wnodes_vm_probe(accel=site.accel, folder=str(folder))["accel"])
    memory_mib = parse_size_mib(args.memory, "memory") if args.memory else site.warm.base_memory_mib
    chooser = Chooser(site, hook)
    wanted = chooser.wanted(image, accel, Size(args.cpus, memory_mib, 0))
    if not wanted or args.cpus < 1:
        raise LimitExceeded(f"template of {entry}: {args.cpus} cpus, {memory_mib} MiB: want at least 1 cpu and 128 MiB")
    began = time.monotonic()
    template = chooser.builder(accel).build(wanted[0], lambda text: print(f"wnodes: {text}", file=sys.stderr))
    grows = "" if template.shape.most_mib else "; its guest has no virtio-mem: clones have exactly its memory"
    print(f"{template.id}  {entry}, {template.way}, {time.monotonic() - began:.1f} s{grows}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    shelf = _chooser().shelf
    ids = [each.template.id for each in shelf.all()]
    if args.all == bool(args.template):
        raise RequestError("template remove: want ids or --all, and not both")
    for word in args.template or ids:
        found = [each for each in ids if each.startswith(word)]
        if len(found) != 1:
            raise RequestError(f"template {word!r}: want the beginning of one of {', '.join(ids) or 'none'}")
        shelf.remove(found[0])
        print(found[0])
    return 0


def _chooser() -> Any:
    from wnodes_core import settings
    from wnodes_core.plugins import Plugins
    from wnodes_core.templates.choose import Chooser

    site = settings.load()
    return Chooser(site, Plugins(disabled=site.plugins.disabled).hook)


def _names() -> dict[str, str]:
    """Image names by the digest of their disk."""
    from wnodes_core import settings
    from wnodes_core.images import layers

    return {entry.disk.digest: str(entry) for store in layers.open_stores(settings.load()) for entry in store.entries()}
