"""What a user asks for: image references, mounts, the one request grammar. Parsed here, once.

Frozen, typed, no I/O. Units stand in the names (``memory_mib``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from wnodes_core.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SIZE = re.compile(r"(\d{1,12})\s*([kmgt]?)(i?b)?\Z", re.IGNORECASE)
_RATE = re.compile(r"(\d{1,6})\s*([mg]?)\Z", re.IGNORECASE)
_SIZE_BYTES = {"": 1 << 20, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size_mib(text: str, what: str = "size") -> int:
    """``8G`` as MiB; a bare number is MiB. Fractions of a MiB round up.

    >>> parse_size_mib("8G"), parse_size_mib("512"), parse_size_mib("1k")
    (8192, 512, 1)

    Raises BadRequest.
    """
    match = _SIZE.match(text.strip())
    if not match or int(match[1]) == 0:
        raise BadRequest(f"{what} {text!r}: want a number with K, M, G or T, as in 8G")
    size = int(match[1]) * _SIZE_BYTES[match[2].lower()]
    return -(-size // (1 << 20))


@dataclass(frozen=True)
class ImageRef:
    """What the user names: ``name``, ``name:tag`` or ``name@sha256:DIGEST``."""

    name: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageRef:
        """Parse a reference.

        >>> ImageRef.parse("el9:2026.1")
        ImageRef(name='el9', tag='2026.1', digest='')

        Raises BadRequest.
        """
        head, _, digest = text.partition("@")
        name, colon, tag = head.partition(":")
        bad = not _NAME.match(name) or (colon and not _NAME.match(tag))
        if bad or ("@" in text and not _DIGEST.match(digest)):
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise BadRequest(f"image {shown!r}: want NAME, NAME:TAG or NAME@sha256:DIGEST")
        return cls(name, tag, digest)

    def __str__(self) -> str:
        tail = f"@{self.digest}" if self.digest else ""
        return self.name + (f":{self.tag}" if self.tag else "") + tail


@dataclass(frozen=True)
class Mount:
    """What the user asks for: host folder ``source`` seen in the guest at ``target``."""

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Mount:
        r"""Parse ``SRC[:DST][:ro|:rw]``; a backslash makes the next character literal.

        >>> Mount.parse("/data:/mnt/data:ro")
        Mount(source='/data', target='/mnt/data', read_only=True)
        >>> Mount.parse("/odd\\:name").target
        '/odd:name'

        Raises BadRequest.
        """
        parts = list(_split(text, ":"))
        read_only = len(parts) > 1 and parts[-1] in ("ro", "rw") and parts.pop() == "ro"
        if not 1 <= len(parts) <= 2 or not parts[0]:
            raise BadRequest(f"mount {text!r}: want SRC[:DST][:ro]")
        source, target = parts[0], parts[-1]
        for role, path in (("source", source), ("target", target)):
            if not path.startswith("/"):
                raise BadRequest(f"mount {text!r}: {role} must be an absolute path, not {path!r}")
            if ".." in path.split("/") or "\0" in path or len(path.encode()) > 4095:
                raise BadRequest(f"mount {text!r}: {role} may not hold '..' or NUL or exceed 4095 bytes")
        return cls(_tidy(source), _tidy(target), read_only)

    def __str__(self) -> str:
        return ":".join(re.sub(r"([\\:,])", r"\\\1", p) for p in (self.source, self.target)) + (
            ":ro" if self.read_only else ""
        )


def _tidy(path: str) -> str:
    return "/" + "/".join(p for p in path.split("/") if p not in ("", "."))


def _split(text: str, separator: str, *, keep: bool = False) -> Iterator[str]:
    """Split at unescaped separators; ``keep`` leaves the backslashes for a later split."""
    part: list[str] = []
    chars = iter(text)
    for char in chars:
        if char == "\\":
            part.append(("\\" if keep else "") + next(chars, "\\"))
        elif char == separator:
            yield "".join(part)
            part = []
        else:
            part.append(char)
    yield "".join(part)


@dataclass(frozen=True)
class VmRequest:
    """One job's wish for a VM, as the user wrote it; ``None`` means "what the job has".

    The grammar is the same in every carrier (LRMS option, submit file, command line):
    ``image=el9,cpus=4,memory=8G,scratch=20G,network=vlan42,mount=/data:/data:ro,start=warm``.
    """

    image: str = ""
    cpus: int | None = None
    memory_mib: int | None = None
    scratch_mib: int | None = None
    network: str = ""
    rate_mbit: int | None = None  # of its network, each way
    mounts: tuple[Mount, ...] = ()
    start: str = ""  # cold, warm or auto; '' = auto
    trace: str = ""  # yes: one line on stderr says where the start's time went
    spare_mounts: int = 0  # room for those of accounts that its job may become: the site's word as well
    storage: tuple[str, ...] = ()  # who may serve its mounts, best first: the site's word, never the user's

    @classmethod
    def parse(cls, text: str) -> VmRequest:
        """Parse the grammar. ``mount`` may stand several times, every other key once.

        >>> VmRequest.parse("image=el9,cpus=2,mount=/a:/b").mounts
        (Mount(source='/a', target='/b', read_only=False),)

        Raises BadRequest, with the nearest known key for a misspelt one.
        """
        values: dict[str, Any] = {}
        mounts: list[Mount] = []
        for item in _split(text, ",", keep=True):
            key, equals, value = item.partition("=")
            key = key.strip()
            if not equals or key not in _GRAMMAR:
                raise BadRequest(f"vm option {item!r}: {_wish(key)}")
            if key == "mount":
                mounts.append(Mount.parse(value))
            elif _GRAMMAR[key][0] in values:
                raise BadRequest(f"vm option {item!r}: {key} is given twice")
            else:
                name, convert = _GRAMMAR[key]
                values[name] = convert(value)
        return cls(mounts=tuple(mounts), **values)

    def merged(self, other: VmRequest) -> VmRequest:
        """This request with every field that ``other`` sets taken from ``other``; mounts add up.

        Raises BadRequest if both name an image and not the same one.
        """
        if self.image and other.image and self.image != other.image:
            raise BadRequest(f"two images asked for, {self.image!r} and {other.image!r}: want one")
        changes = {f.name: getattr(other, f.name) for f in fields(other) if getattr(other, f.name)}
        changes["mounts"] = self.mounts + tuple(m for m in other.mounts if m not in self.mounts)
        return replace(self, **changes)

    def text(self) -> str:
        r"""The request in its own grammar: ``parse`` gives it back.

        >>> VmRequest("el9", memory_mib=512, mounts=(Mount("/a,b", "/a,b", True),)).text()
        'image=el9,memory=512M,mount=/a\\,b:/a\\,b:ro'
        """
        sizes = {"cpus": self.cpus, "memory": _mib(self.memory_mib), "scratch": _mib(self.scratch_mib)}
        words = {"image": self.image, **sizes, "network": self.network, "start": self.start, "trace": self.trace}
        items = [f"{key}={value}" for key, value in words.items() if value]
        return ",".join(items + [f"mount={mount}" for mount in self.mounts])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VmRequest:
        """Back from ``to_dict``; trusted text only (our own journal and sockets)."""
        lists = {"mounts": tuple(Mount(**m) for m in data.get("mounts", ())), "storage": tuple(data.get("storage", ()))}
        return cls(**{**data, **lists})


def _mib(size: int | None) -> str:
    return f"{size}M" if size else ""


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", text.strip()):
        raise BadRequest(f"cpus {text!r}: want a whole number from 1")
    return int(text)


def _image(text: str) -> str:
    return str(ImageRef.parse(text))


def _network(text: str) -> str:
    if not _NAME.match(text):
        raise BadRequest(f"network {text!r}: want a name of letters, digits, '.', '_' and '-'")
    return text


def _rate(text: str) -> int:
    match = _RATE.match(text.strip())
    if not match or int(match[1]) == 0:
        raise BadRequest(f"rate {text!r}: want Mbit a second, as in 100M or 1G")
    return int(match[1]) * (1000 if match[2].lower() == "g" else 1)


def _one_of(key: str, *words: str) -> Any:
    def convert(text: str) -> str:
        if text.strip() not in words:
            raise BadRequest(f"{key} {text!r}: want {', '.join(words[:-1])} or {words[-1]}")
        return text.strip()

    return convert


_GRAMMAR: dict[str, tuple[str, Any]] = {
    "image": ("image", _image),
    "cpus": ("cpus", _count),
    "memory": ("memory_mib", lambda text: parse_size_mib(text, "memory")),
    "scratch": ("scratch_mib", lambda text: parse_size_mib(text, "scratch")),
    "network": ("network", _network),
    "rate": ("rate_mbit", _rate),
    "mount": ("mounts", Mount.parse),
    "start": ("start", _one_of("start", "auto", "warm", "cold")),
    "trace": ("trace", _one_of("trace", "yes", "no")),
}


def _wish(key: str) -> str:
    import difflib  # only on the way to an error: 5 ms

    near = difflib.get_close_matches(key, _GRAMMAR, 1)
    return f"did you mean {near[0]}=?" if near else f"want KEY=VALUE with one of {', '.join(_GRAMMAR)}"
