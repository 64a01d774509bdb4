"""``wnodes image``: its verbs and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from wnodes_core.cli import image_verbs as verbs
from wnodes_core.cli import parsers


def add_parser(subparsers: Any) -> None:
    """Add ``image`` and its verbs to the command line."""
    parser = parsers.add_command(
        subparsers,
        "image",
        None,
        about=parsers.COMMANDS["image"][1],
        text="The image store. root manages the node's; everybody else sees that one and has an own\n"
        "one in $XDG_CACHE_HOME/wnodes/images (~/.cache/wnodes/images).",
        examples="""
        wnodes image list
        wnodes image add debian12 /data/debian12.qcow2
        wnodes image pull el9:2026.1
        wnodes image purge --dry-run""",
    )
    group = parsers.add_group(parser)
    for add in (_add_add, _add_pull, _add_list, _add_show, _add_tag, _add_verify, _add_rm, _add_purge):
        add(group)


def _add_add(group: Any) -> None:
    parser = _command(
        group,
        "add",
        verbs.add,
        about="bring an image in and enter it in the catalogue",
        text="Bring an image in from a path or an http(s) URL, check it, and enter it as NAME[:TAG].\n"
        "An entry of that name and tag is replaced. The source is kept, to fetch it from again.",
        examples="""
        wnodes image add debian12 /data/debian12.qcow2
        wnodes image add el9:2026.1 https://example.org/el9.qcow2 --sha256 5d41…  # pinned
        wnodes image add tiny /data/tiny.img --format raw --kernel /data/vmlinuz --cmdline 'console=ttyS0'
        wnodes image add cms /data/cms.qcow2 --group cms  # for members of cms only""",
    )
    parser.add_argument("name", metavar="NAME[:TAG]", help="what users will call it (TAG: latest)")
    parser.add_argument("source", metavar="SOURCE", help="path, or http:// or https:// URL")
    parser.add_argument("--sha256", default="", metavar="HEX", help="the digest that the file must have")
    parser.add_argument("--format", default="", choices=("qcow2", "raw"), help="disk format; raw must be said")
    parser.add_argument("--arch", default="x86_64", help="processor architecture (default: x86_64)")
    parser.add_argument("--cmdline", default="", help="kernel command line, with --kernel")
    for name in ("kernel", "initrd"):
        parser.add_argument(f"--{name}", default="", metavar="SOURCE", help=f"{name} of an image without boot loader")
    for name, what in (("mirror", "a further source of the disk"), ("alias", "a further name")):
        parser.add_argument(f"--{name}", action="append", default=[], help=f"{what}; may stand several times")
    for name in ("user", "group"):
        parser.add_argument(f"--{name}", action="append", default=[], help=f"only for this {name} (and others named)")
    parser.add_argument("--fact", action="append", default=[], metavar="KEY=VALUE", help="fact on the guest: os=el9")
    _add_quiet(parser)


def _add_pull(group: Any) -> None:
    parser = _command(
        group,
        "pull",
        verbs.pull,
        about="fetch images of the catalogue now",
        text="Fetch images, so that the first job need not wait. At once for one that is here.",
        examples="""
        wnodes image pull debian12
        wnodes image pull --all  # whatever the catalogue has""",
    )
    _add_images(parser)
    _add_quiet(parser)


def _add_list(group: Any) -> None:
    _command(
        group,
        "list",
        verbs.list_,
        about="list the images that you may use",
        text="List the images of the catalogue that you may use, fetched or not.",
        examples="wnodes image list\nwnodes image list --json",
    )


def _add_show(group: Any) -> None:
    parser = _command(
        group,
        "show",
        verbs.show,
        about="show all there is to know of an image",
        text="Show an image: digest, sources, files, facts, who may use it.",
        examples="wnodes image show debian12\nwnodes image show debian12 --json",
    )
    parser.add_argument("image", metavar="IMAGE", help="NAME, NAME:TAG or NAME@sha256:DIGEST")


def _add_tag(group: Any) -> None:
    parser = _command(
        group,
        "tag",
        verbs.tag,
        about="give an image a further name or tag",
        text="Give an image a further name or tag; whatever had that name and tag loses it.",
        examples="wnodes image tag el9:2026.1 el9:latest",
    )
    parser.add_argument("image", metavar="IMAGE", help="the image as it is called now")
    parser.add_argument("new", metavar="NAME[:TAG]", help="the further name")


def _add_verify(group: Any) -> None:
    parser = _command(
        group,
        "verify",
        verbs.verify,
        about="read images again and compare their digests",
        text="Read images again and compare digest and format. One that proves wrong is removed, unless\n"
        "it is in use, and fetched anew at its next use. Exit code 1 if any is wrong.",
        examples="wnodes image verify debian12\nwnodes image verify --all",
    )
    _add_images(parser)
    _add_quiet(parser)


def _add_rm(group: Any) -> None:
    parser = _command(
        group,
        "rm",
        verbs.rm,
        about="take images out of the catalogue and the store",
        text="Take images out of the catalogue; their files go too unless another image or a VM needs them.",
        examples="wnodes image rm el9:2025.4",
    )
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="NAME, NAME:TAG or NAME@sha256:DIGEST")


def _add_purge(group: Any) -> None:
    parser = _command(
        group,
        "purge",
        verbs.purge,
        about="make room as the settings say",
        text="Remove files of images that are old, that nothing names, and, above the high watermark, those\n"
        "least recently used. Never one in use, never an only copy. The catalogue stays.",
        examples="wnodes image purge --dry-run\nwnodes image purge",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def _command(group: Any, name: str, handler: Callable[[argparse.Namespace], int], **texts: str) -> Any:
    parser = parsers.add_command(group, name, handler, **texts)
    parsers.add_json(parser)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", nargs="*", help="NAME, NAME:TAG or NAME@sha256:DIGEST")
    parser.add_argument("--all", action="store_true", help="all images that you may use")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
