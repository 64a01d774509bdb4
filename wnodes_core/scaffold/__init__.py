"""``wnodes plugin new``: a package that works from its first minute, with tests that hold it to the contract.

Templates are files below this folder, named ``*.txt`` so that nobody takes them for the house's own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from wnodes_core import __version__
from wnodes_core.errors import BadRequest, WnodesError

KINDS = {
    "lrms": "a batch system",
    "image": "a source of images",
    "storage": "a way to mount folders",
    "network": "a kind of network",
    "policy": "a rule of who may have what",
}
_NAME = re.compile(r"[a-z][a-z0-9]{0,30}\Z")
_TAKEN = ("core",)


def files(name: str, kind: str) -> dict[str, str]:
    """Every file of the new package: its path, its text.

    >>> sorted(files("chem", "policy"))
    ['README.md', 'pyproject.toml', 'tests/test_contract.py', 'wnodes_chem/__init__.py', 'wnodes_chem/plugin.py']

    Raises BadRequest.
    """
    if not _NAME.match(name) or name in _TAKEN:
        raise BadRequest(f"name {name!r}: want a new word of small letters and digits, as in flux")
    if kind not in KINDS:
        raise BadRequest(f"kind {kind!r}: want one of {', '.join(KINDS)}")
    words = {
        "@name@": name,
        "@NAME@": name.upper(),
        "@Name@": name.capitalize(),
        "@package@": f"wnodes_{name}",
        "@major@": __version__.partition(".")[0],
        "@kind@": kind,
        "@about@": KINDS[kind],
    }
    root = resources.files(__package__)
    found = {**dict(_below(root / "common", "")), **dict(_below(root / kind, ""))}
    return {_filled(path, words): _filled(text, words) for path, text in found.items()}


def write(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the package to ``folder``, which must not exist; the paths written.

    Raises BadRequest, WnodesError if the folder is there or cannot be written.
    """
    package = files(name, kind)
    try:
        folder.mkdir(parents=True)
        for path, text in package.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            target.chmod(0o755 if text.startswith("#!") else 0o644)
    except OSError as error:
        raise WnodesError(f"{error.filename}: {error.strerror}: want a folder that is not there yet") from error
    return [folder / path for path in package]


def _below(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".txt"):
            place = f"{prefix}{entry.name.removesuffix('.txt')}"
            yield _place(place), entry.read_text(encoding="utf-8")


def _place(path: str) -> str:
    """Where a template goes: packaging files and tests to the top, all else into the package."""
    top = path in ("pyproject.toml", "README.md") or path.startswith("test_")
    return ("tests/" if path.startswith("test_") else "") + path if top else f"@package@/{path}"


def _filled(text: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
