"""The catalogue: which images there are, what they consist of, and who may use them.

A catalogue file is YAML or JSON::

    images:
      - name: el9
        tag: "2026.1"
        aliases: [almalinux9]
        sha256: 5d41…            # of the disk, uncompressed
        format: qcow2            # or raw
        sources: [https://images.example.org/el9.qcow2, /cvmfs/images/el9.qcow2]
        boot:                    # only for an image without a boot loader
          kernel: {sha256: 9f86…, sources: [https://images.example.org/vmlinuz]}
          initrd: {sha256: 60b7…, sources: [https://images.example.org/initrd]}
          cmdline: console=ttyS0 root=/dev/vda
        facts: {os: el9, agent: cloud-init}
        users: [alice]           # neither users nor groups: everybody
        groups: [cms]
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wnodes_core.errors import AmbiguousImage, BadRequest, ImageDenied, SettingsError, UnknownImage
from wnodes_core.images.users import User
from wnodes_core.model import ImageRef

FORMATS = ("qcow2", "raw")
_HEX = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")
_SOURCE = re.compile(r"(/|[a-z][a-z0-9+.-]*://)[^\x00-\x1f\x7f]+\Z")
_KEYS = ("name", "tag", "aliases", "sha256", "sources", "format", "arch", "boot", "facts", "users", "groups")
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Part:
    """One file of an image (disk, kernel, initrd): its digest and where it can be had."""

    digest: str
    sources: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Any, what: str) -> Part:
        """Parse ``{sha256: HEX, sources: [...]}``. Raises SettingsError."""
        if not isinstance(data, Mapping):
            raise SettingsError(f"{what}: want sha256 and sources, not {data!r}")
        match = _HEX.match(str(data.get("sha256", "")))
        if not match:
            raise SettingsError(f"{what}: sha256 {data.get('sha256')!r}: want 64 hexadecimal digits")
        sources = _texts(data, "sources", what)
        for source in sources:
            check_source(source, what)
        return cls(f"sha256:{match[1]}", sources)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a catalogue file."""
        return {"sha256": self.digest.removeprefix("sha256:"), "sources": list(self.sources)}


@dataclass(frozen=True)
class Entry:
    """One image of the catalogue, fetched or not."""

    name: str
    tag: str
    disk: Part
    format: str
    arch: str = "x86_64"
    kernel: Part | None = None
    initrd: Part | None = None
    cmdline: str = ""
    aliases: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All files of the image; the disk comes last, so that it appears when all is there."""
        return tuple(part for part in (self.kernel, self.initrd, self.disk) if part)

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all files of the image."""
        return tuple(part.digest for part in self.parts)

    @property
    def public(self) -> bool:
        """Whether every user may have it."""
        return not self.users and not self.groups

    def allows(self, user: User) -> bool:
        """Whether this user may have it. root may."""
        return self.public or user.uid == 0 or user.name in self.users or bool(set(user.groups) & set(self.groups))

    @classmethod
    def from_dict(cls, data: Any, origin: str) -> Entry:
        """Parse one entry of a catalogue file. Raises SettingsError that names ``origin``."""
        if not isinstance(data, Mapping):
            raise SettingsError(f"{origin}: an image must be a mapping, not {data!r:.60}")
        what = f"{origin}: image {data.get('name')!r}"
        _only(data, _KEYS, what)
        tag = str(data.get("tag", "latest"))
        aliases = _texts(data, "aliases", what)
        _check_names(str(data.get("name", "")), tag, aliases, what)
        if data.get("format") not in FORMATS:
            raise SettingsError(f"{what}: format {data.get('format')!r}: want one of {', '.join(FORMATS)}")
        boot = data.get("boot") or {}
        _only(boot, ("kernel", "initrd", "cmdline"), f"{what}: boot")
        files = {key: Part.from_dict(boot[key], f"{what}: {key}") for key in ("kernel", "initrd") if key in boot}
        return cls(
            name=str(data["name"]),
            tag=tag,
            disk=Part.from_dict(data, what),
            format=str(data["format"]),
            arch=str(data.get("arch", "x86_64")),
            cmdline=str(boot.get("cmdline", "")),
            aliases=aliases,
            facts={str(k): str(v) for k, v in dict(data.get("facts") or {}).items()},
            users=_texts(data, "users", what),
            groups=_texts(data, "groups", what),
            origin=origin,
            **files,
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a catalogue file."""
        data: dict[str, Any] = {"name": self.name, "tag": self.tag, "format": self.format, "arch": self.arch}
        data |= self.disk.to_dict()
        boot: dict[str, Any] = {k: p.to_dict() for k, p in (("kernel", self.kernel), ("initrd", self.initrd)) if p}
        if boot:
            data["boot"] = {**boot, "cmdline": self.cmdline}
        for key in ("aliases", "users", "groups"):
            if getattr(self, key):
                data[key] = list(getattr(self, key))
        return data | ({"facts": dict(self.facts)} if self.facts else {})


def check_source(source: str, what: str) -> None:
    """A source is an absolute path or an URL. Raises SettingsError."""
    if not _SOURCE.match(source) or len(source) > 4096:
        raise SettingsError(f"{what}: source {source[:80]!r}: want an absolute path or an URL")


def _texts(data: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    values = data.get(key) or ()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SettingsError(f"{what}: {key} {values!r:.60}: want a list")
    return tuple(str(value) for value in values)


def _only(data: Any, known: Sequence[str], what: str) -> None:
    if not isinstance(data, Mapping):
        raise SettingsError(f"{what}: want a mapping, not {data!r:.60}")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise SettingsError(f"{what}: unknown key {key!r}: want one of {', '.join(near or known)}")


def _check_names(name: str, tag: str, aliases: Iterable[str], what: str) -> None:
    try:
        ImageRef.parse(f"{name}:{tag}")
        for alias in aliases:
            if ImageRef.parse(alias) != ImageRef(alias):
                raise BadRequest(f"alias {alias!r}: want a bare name")
    except BadRequest as error:
        raise SettingsError(f"{what}: {error}") from error


def read_file(path: Path) -> list[Entry]:
    """The images of one catalogue file. Raises SettingsError for any flaw in it, OSError."""
    with open(path, "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise SettingsError(f"{path}: larger than {_MAX_BYTES} bytes: not a catalogue")
    try:
        data = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error
    _only(data, ("images",), str(path))
    images = data.get("images")
    images = () if images is None else images
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise SettingsError(f"{path}: images: want a list")
    return [Entry.from_dict(image, str(path)) for image in images]


def _yaml(text: bytes) -> Any:
    import yaml  # 22 ms: only for a site's own files

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if data is None else data  # an empty file, or nothing but comments


def read_folders(folders: Iterable[Path]) -> tuple[list[Entry], list[SettingsError]]:
    """All images of all catalogue files, and what is wrong with the files that do not count.

    One broken file does not take the other images away. The first of two entries with the
    same name and tag wins.
    """
    found: dict[str, Entry] = {}
    problems: list[SettingsError] = []
    paths = (path for folder in folders for path in sorted(folder.glob("[!.]*")))
    for path in paths:
        if path.suffix not in (".json", ".yaml", ".yml"):
            continue
        try:
            entries = read_file(path)
        except SettingsError as error:
            problems.append(error)
        except OSError as error:
            problems.append(SettingsError(f"{path}: {error.strerror}"))
        else:
            for entry in entries:
                found.setdefault(str(entry), entry)
    return list(found.values()), problems


def resolve(entries: Iterable[Entry], ref: ImageRef, user: User) -> Entry:
    """The one image that ``ref`` means for this user.

    A name goes before an alias; without a tag the only one counts, else ``latest``.

    Raises UnknownImage (with near names), AmbiguousImage, ImageDenied.
    """
    entries = list(entries)
    named = [e for e in entries if e.name == ref.name] or [e for e in entries if ref.name in e.aliases]
    matching = [e for e in named if ref.tag in ("", e.tag) and ref.digest in ("", e.disk.digest)]
    found = [e for e in matching if e.allows(user)]
    if matching and not found:
        raise ImageDenied(
            f"image '{ref}': not for user {user.name!r}",
            hint=f"it is for {', '.join((*matching[0].users, *('group ' + g for g in matching[0].groups)))}",
        )
    if not found:
        raise UnknownImage(f"image '{ref}': {_unknown(ref, named, entries, user)}")
    return _one_of(found, ref)


def _one_of(found: list[Entry], ref: ImageRef) -> Entry:
    latest = [e for e in found if e.tag == "latest"] or found
    if len({e.disk.digest for e in found}) == 1 or (len(latest) == 1 and len({e.name for e in found}) == 1):
        return latest[0]
    raise AmbiguousImage(
        f"image '{ref}': {len(found)} images answer to that name", hint=f"say one of {', '.join(map(str, found))}"
    )


def _unknown(ref: ImageRef, named: list[Entry], entries: list[Entry], user: User) -> str:
    visible = [e for e in named if e.allows(user)]
    if visible and ref.digest:
        return f"no such digest; {visible[0]} is {visible[0].disk.digest}"
    if visible:
        return f"no such tag; there is {', '.join(sorted(e.tag for e in visible))}"
    names = sorted({n for e in entries if e.allows(user) for n in (e.name, *e.aliases)})
    near = difflib.get_close_matches(ref.name, names, 3) or [n for n in names if n.startswith(ref.name[:3])][:3]
    if near:
        return f"no such image; did you mean {' or '.join(near)}?"
    return f"no such image; there is {', '.join(names[:10])}" if names else "no such image; the catalogue is empty"
