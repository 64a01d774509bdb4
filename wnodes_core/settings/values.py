"""Words of a settings file as values: sizes, durations, percentages, paths, choices.

Every converter takes the word as it stands in the file and raises ValueError (or one of our
RequestErrors) with the wish; ``load`` adds file, line and column.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from wnodes_core.model import Mount

Convert = Callable[[str], object]

_SIZE = re.compile(r"(\d{1,15})\s*([kmgt]?)(?:i?b)?\Z", re.IGNORECASE)
_POWER = {"k": 10, "m": 20, "g": 30, "t": 40}
_DURATION = re.compile(r"(\d{1,9})\s*([smhdw]?)\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BOOLEAN = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SOCKET_BYTES = 107  # sun_path holds 108 with its NUL (unix(7))


def whole(text: str) -> int:
    """A whole number from 0."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError("want a whole number from 0")
    return int(text)


def numbers(text: str) -> range:
    """A range of numbers from 1, both ends in it; ``none`` is one too.

    >>> numbers("64000-64063"), len(numbers("none"))
    (range(64000, 64064), 0)
    """
    if text == "none":
        return range(0)
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if not match or not 0 < int(match[1]) <= int(match[2]):
        raise ValueError("want a range of numbers as in 90000-90063, or none")
    return range(int(match[1]), int(match[2]) + 1)


def numbers_text(text: str) -> str:
    """A range of numbers as it was written."""
    numbers(text)
    return text


def yes_no(text: str) -> bool:
    """A boolean in any of YAML's spellings."""
    if text.lower() not in _BOOLEAN:
        raise ValueError("want true or false")
    return _BOOLEAN[text.lower()]


def size(unit: str) -> Convert:
    """A size counted in ``unit`` (``k`` or ``m``, powers of 1024): ``8G``, or a bare number of units."""

    def convert(text: str) -> int:
        match = _SIZE.match(text)
        if not match:
            raise ValueError(f"want a size as in 8G, or a number of {unit.upper()}iB")
        amount = int(match[1]) << _POWER[match[2].lower() or unit]
        return -(-amount >> _POWER[unit])  # rounded up

    return convert


def duration(unit: str, least: int = 1) -> Convert:
    """A duration counted in ``unit`` (``s`` or ``d``): ``30m``, or a bare number of units."""

    def convert(text: str) -> int:
        match = _DURATION.match(text)
        if not match:
            raise ValueError("want a duration as in 90s, 30m, 12h or 7d")
        seconds = int(match[1]) * _SECONDS[match[2] or unit]
        amount, rest = divmod(seconds, _SECONDS[unit])
        if rest or amount < least:
            raise ValueError(f"want at least {least}{unit}, in whole {unit}")
        return amount

    return convert


def percent(text: str) -> int:
    """A whole percentage, with or without its sign."""
    number = text.removesuffix("%").strip()
    if not re.fullmatch(r"\d{1,3}", number) or int(number) > 100:
        raise ValueError("want a percentage from 0 to 100")
    return int(number)


def folder(text: str) -> str:
    """An absolute path without ``..``, tidied."""
    if not text.startswith("/") or ".." in text.split("/") or "\0" in text:
        raise ValueError("want an absolute path without '..'")
    return "/" + "/".join(p for p in text.split("/") if p not in ("", "."))


def folder_or(word: str) -> Convert:
    """A folder, or the one word that stands for another place."""

    def convert(text: str) -> str:
        if text == word:
            return text
        try:
            return folder(text)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return convert


def socket_path(text: str) -> str:
    """An absolute path that fits a Unix socket's address."""
    path = folder(text)
    if len(path.encode()) > _SOCKET_BYTES:
        raise ValueError(f"want a socket path of at most {_SOCKET_BYTES} bytes")
    return path


def metrics_address(text: str) -> str:
    """``unix:/PATH``, or a port of the loopback interface."""
    if text.startswith("unix:"):
        return "unix:" + socket_path(text[5:])
    match = re.fullmatch(r"(?:127\.0\.0\.1|\[::1\]):(\d{1,5})", text)
    if not match or not 0 < int(match[1]) < 65536:
        raise ValueError("want unix:/PATH or 127.0.0.1:PORT")
    return text


def choice(*words: str) -> Convert:
    """One word of a fixed few."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"want {', '.join(words[:-1])} or {words[-1]}")
        return text

    return convert


def account(text: str) -> str:
    """An account by its name, or ``@GROUP`` for all that are in it: a pattern would sanction names not yet given."""
    if not re.fullmatch(r"@?[A-Za-z_][A-Za-z0-9_.-]{0,63}", text):
        raise ValueError("want the name of an account, or @GROUP")
    return text


def place(text: str) -> str:
    """A host folder of a rule: absolute, or below ``~``; ``{user}`` stands for the user's name."""
    if text != "~" and not text.startswith("~/"):
        folder(text)
    elif ".." in text.split("/"):
        raise ValueError("want a path without '..'")
    return text


def mount(text: str) -> str:
    """A mount of a rule: ``SRC[:DST][:ro]`` whose paths may begin with ``~`` and hold ``{user}``."""
    Mount.parse(expand_mount(text, "/home/user", "user"))
    return text


def expand_mount(text: str, home: str, user: str) -> str:
    r"""A rule's mount for one user: ``~`` at the start of a path, ``{user}`` anywhere.

    >>> expand_mount("~/data:/scratch/{user}:ro", "/home/ann", "ann")
    '/home/ann/data:/scratch/ann:ro'
    """
    home, user = (re.sub(r"([\\:])", r"\\\1", word) for word in (home.rstrip("/"), user))
    return re.sub(r"(^|:)~(?=[/:]|$)", lambda match: match[1] + (home or "/"), text).replace("{user}", user)


def expand_place(text: str, home: str, user: str) -> str:
    """A rule's folder for one user.

    >>> expand_place("~/data/{user}", "/home/ann", "ann")
    '/home/ann/data/ann'
    """
    if text == "~" or text.startswith("~/"):
        text = home + "/" + text[1:]
    return folder(text.replace("{user}", user))
