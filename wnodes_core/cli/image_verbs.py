"""What the verbs of ``wnodes image`` do."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wnodes_core import settings
from wnodes_core.cli import output
from wnodes_core.errors import BadRequest, WnodesError
from wnodes_core.images import Entry, Purged, Stores, open_stores
from wnodes_core.images.flight import Progress, quiet
from wnodes_core.images.progress import Bar
from wnodes_core.plugins import Plugins


def _stores() -> Stores:
    site = settings.load()
    # Fetching and verifying is all that is wanted: no backend, so no libvirt.
    plugins = Plugins(disabled=site.plugins.disabled, builtins=("wnodes_core.images.sources",))
    return open_stores(site, plugins.hook)


@contextmanager
def _bar(args: argparse.Namespace, label: str) -> Iterator[Progress]:
    if args.quiet or args.json:
        yield quiet
        return
    bar = Bar(label)
    try:
        yield bar
    finally:
        bar.close()


def _named(args: argparse.Namespace, stores: Stores) -> list[Entry]:
    if args.all == bool(args.image):
        raise BadRequest("no image named: want IMAGE … or --all" if not args.all else "want IMAGE … or --all, not both")
    return list(stores.list()) if args.all else [stores.resolve(name) for name in args.image]


def add(args: argparse.Namespace) -> int:
    """Bring an image in and enter it."""
    stores = _stores()
    facts = dict(fact.partition("=")[::2] for fact in args.fact if "=" in fact)
    if len(facts) != len(args.fact):
        raise BadRequest(f"--fact {args.fact!r}: want KEY=VALUE, each key once")
    if (args.initrd or args.cmdline) and not args.kernel:
        raise BadRequest("--initrd and --cmdline want --kernel")
    with _bar(args, args.name) as progress:
        entry = stores.own.add(
            _absolute(args.source),
            args.name,
            sha256=args.sha256,
            format=args.format,
            mirrors=[_absolute(mirror) for mirror in args.mirror],
            kernel=_absolute(args.kernel),
            initrd=_absolute(args.initrd),
            cmdline=args.cmdline,
            arch=args.arch,
            aliases=args.alias,
            facts=facts,
            users=args.user,
            groups=args.group,
            progress=progress,
            deadline=_deadline(),
        )
    return _told(args, [{**_facts(stores, entry)}], f"{entry}  {entry.disk.digest}")


def _absolute(source: str) -> str:
    return source if not source or "://" in source else os.path.abspath(source)


def _deadline() -> float:
    return time.monotonic() + settings.load().images.fetch_timeout_s


def pull(args: argparse.Namespace) -> int:
    """Fetch images now."""
    stores = _stores()
    pulled = []
    for entry in _named(args, stores):
        with _bar(args, str(entry)) as progress:
            image = stores.ensure(entry, progress, _deadline())
        pulled.append({"image": str(entry), "digest": image.digest, "path": image.path})
    return _told(args, pulled, "\n".join(f"{one['image']}  {one['digest']}" for one in pulled))


def list_(args: argparse.Namespace) -> int:
    """List the images that the caller may have."""
    stores = _stores()
    images = [_facts(stores, entry) for entry in stores.list()]
    for problem in stores.problems():
        print(f"wnodes: warning: {output.clean(problem.message)}", file=sys.stderr)
    if args.json:
        output.print_json(images)
        return 0
    rows = [
        (
            one["name"],
            one["tag"],
            ", ".join(one["aliases"]) or "-",
            one["format"],
            one["arch"],
            output.size(one["size_bytes"]) if one["store"] else "-",
            {"own": "yours" if os.geteuid() else "yes", "node": "node", "": "no"}[one["store"]],
            output.age(one["idle_s"]) if one["store"] else "-",
        )
        for one in images
    ]
    output.print_table(["NAME", "TAG", "ALIASES", "FORMAT", "ARCH", "SIZE", "HERE", "LAST USE"], rows, right=[5])
    return 0


def _facts(stores: Stores, entry: Entry) -> dict[str, Any]:
    holder = stores.holder(entry)
    found: dict[str, Any] = {"store": "", "path": "", "size_bytes": 0, "idle_s": 0.0}
    if holder is not None:
        path = holder.layout.blob(entry.disk.digest)
        status = path.stat()
        found = {
            "store": "own" if holder is stores.own else "node",
            "path": str(path),
            "size_bytes": sum(holder.layout.blob(digest).stat().st_blocks * 512 for digest in entry.digests),
            "idle_s": round(max(0.0, time.time() - status.st_mtime), 1),
        }
    return {"aliases": [], "facts": {}, **entry.to_dict(), "digest": entry.disk.digest, **found}


def show(args: argparse.Namespace) -> int:
    """Show all about one image."""
    stores = _stores()
    entry = stores.resolve(args.image)
    facts = {**_facts(stores, entry), "catalogue": entry.origin, "used_by": ""}
    if holder := stores.holder(entry):
        facts["used_by"] = holder.used_by(entry)
    if args.json:
        output.print_json(facts)
        return 0
    facts.pop("sha256")
    facts["size_bytes"] = output.size(facts["size_bytes"])
    for key, value in facts.items():
        if value not in ("", [], {}):
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"{key.replace('_', ' '):<12} {output.clean(shown)}")
    return 0


def tag(args: argparse.Namespace) -> int:
    """Give an image a further name."""
    stores = _stores()
    entry = stores.own.tag(args.image, args.new)
    return _told(args, [_facts(stores, entry)], f"{entry}  {entry.disk.digest}")


def verify(args: argparse.Namespace) -> int:
    """Read images again; 1 if one is wrong."""
    stores = _stores()
    told, bad = [], 0
    for entry in _named(args, stores):
        holder = stores.holder(entry)
        if holder is None and args.all:
            continue
        problem = ""
        try:
            with _bar(args, str(entry)) as progress:
                (holder or stores.own).verify(entry, progress)
        except WnodesError as error:
            problem, bad = f"{error.message} ({error.hint})" if error.hint else error.message, 1
        told.append({"image": str(entry), "digest": entry.disk.digest, "problem": problem})
    _told(args, told, "\n".join(f"{one['image']}  {one['problem'] or 'ok'}" for one in told))
    return bad


def rm(args: argparse.Namespace) -> int:
    """Take images away."""
    stores = _stores()
    gone: list[Purged] = []
    for name in args.image:
        entry = stores.own.resolve(name)
        removed = stores.own.remove(f"{entry}")
        gone += removed
        if not removed and not args.json:
            print(f"{entry}: the name is removed; its files stay, for they are used or have other names")
    return _told_gone(args, gone, "removed") if gone or args.json else 0


def purge(args: argparse.Namespace) -> int:
    """Make room."""
    gone = _stores().own.purge(settings.load().images.purge, dry_run=args.dry_run)
    return _told_gone(args, list(gone), "would remove" if args.dry_run else "removed")


def _told_gone(args: argparse.Namespace, gone: list[Purged], verb: str) -> int:
    rows = [(", ".join(one.names) or "-", one.digest[:19], output.size(one.size_bytes), one.reason) for one in gone]
    total = output.size(sum(one.size_bytes for one in gone))
    text = output.table(["IMAGE", "DIGEST", "SIZE", "WHY"], rows, right=[2]) + f"\n{verb} {len(gone)} files, {total}"
    values = [
        {"digest": one.digest, "names": list(one.names), "size_bytes": one.size_bytes, "reason": one.reason}
        for one in gone
    ]
    return _told(args, values, text if gone else f"{verb} nothing")


def _told(args: argparse.Namespace, values: list[dict[str, Any]], text: str) -> int:
    if args.json:
        output.print_json(values)
    elif text:
        print(output.clean(text, keep="\n"))
    return 0
