"""The catalogue: its files, its flaws, and what a name means to whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wnodes_core.errors import AmbiguousImage, ImageDenied, SettingsError, UnknownImage
from wnodes_core.images.catalogue import Entry, Part, read_file, read_folders, resolve
from wnodes_core.images.users import User
from wnodes_core.model import ImageRef

ALICE = User(1000, "alice", ("users", "cms"))
BOB = User(1001, "bob", ("users",))
ROOT = User(0, "root", ("root",))
HEX = "ab" * 32


def entry(name: str, tag: str = "latest", digit: str = "a", **more: Any) -> Entry:
    return Entry(name, tag, Part(f"sha256:{digit * 64}"), "qcow2", **more)


def ask(entries: list[Entry], text: str, user: User = ALICE) -> Entry:
    return resolve(entries, ImageRef.parse(text), user)


def test_a_full_entry_survives_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        f"""
images:
  - name: el9
    tag: "2026.1"
    aliases: [alma, rocky]
    sha256: {HEX}
    format: qcow2
    arch: aarch64
    sources: [https://example.org/a b.qcow2, /cvmfs/él9.qcow2]
    boot:
      kernel: {{sha256: {HEX}, sources: [/k]}}
      initrd: {{sha256: "sha256:{HEX}", sources: [/i]}}
      cmdline: console=ttyS0
    facts: {{os: el9, cpus: 2}}
    users: [alice]
    groups: [cms]
"""
    )
    (found,) = read_file(path)
    assert (found.name, found.tag, found.arch, found.aliases) == ("el9", "2026.1", "aarch64", ("alma", "rocky"))
    assert found.disk == Part(f"sha256:{HEX}", ("https://example.org/a b.qcow2", "/cvmfs/él9.qcow2"))
    assert found.kernel == Part(f"sha256:{HEX}", ("/k",)) and found.cmdline == "console=ttyS0"
    assert found.facts == {"os": "el9", "cpus": "2"}
    assert not found.public
    assert Entry.from_dict(json.loads(json.dumps(found.to_dict())), found.origin) == found


GOOD = {"name": "x", "sha256": HEX, "format": "raw"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../x"}, "want NAME"),
        ({"name": "-x"}, "want NAME"),
        ({"name": "a" * 80}, "want NAME"),
        ({"name": "x\n"}, "want NAME"),
        ({"tag": "a/b"}, "want NAME"),
        ({"aliases": ["a:b"]}, "want a bare name"),
        ({"aliases": "x"}, "aliases 'x': want a list"),
        ({"sha256": "abc"}, "want 64 hexadecimal digits"),
        ({"sha256": HEX.upper()}, "want 64 hexadecimal digits"),
        ({"format": "vmdk"}, "format 'vmdk': want one of qcow2, raw"),
        ({"sources": ["relative/path"]}, "want an absolute path or an URL"),
        ({"sources": ["/a\nb"]}, "want an absolute path or an URL"),
        ({"formt": "raw"}, "unknown key 'formt': want one of format"),
        ({"boot": {"kernel": "/vmlinuz"}}, "kernel: want sha256 and sources"),
        ({"boot": ["kernel"]}, "boot: want a mapping"),
    ],
)
def test_a_bad_entry_names_the_file_and_the_wish(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"images": [{**GOOD, **change}]}))
    with pytest.raises(SettingsError) as caught:
        read_file(path)
    assert str(path) in caught.value.message and said in caught.value.message


@pytest.mark.parametrize("text", ["{", "[]", "images: {a: b}", "images: [7]", "\0", "a: [", "image: []", "images: no"])
def test_a_corrupt_file_leaves_the_others_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps({"images": [GOOD]}))
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "dangling.yaml").symlink_to("/nonexistent/file")
    (tmp_path / ".hidden.yaml").write_text("[")
    (tmp_path / "README").write_text("[")
    entries, problems = read_folders([tmp_path, tmp_path / "absent"])
    assert [e.name for e in entries] == ["x"]
    assert sorted(Path(p.message.split(":")[0]).name for p in problems) == ["bad.yaml", "dangling.yaml"]


def test_a_huge_file_is_no_catalogue(tmp_path: Path) -> None:
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(SettingsError, match="not a catalogue"):
        read_file(tmp_path / "huge.json")


def test_the_first_folder_wins(tmp_path: Path) -> None:
    for name, digit in (("site", "1"), ("own", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps({"images": [{**GOOD, "sha256": digit * 64}]}))
    (found,), _ = read_folders([tmp_path / "site", tmp_path / "own"])
    assert found.disk.digest == f"sha256:{'1' * 64}"


def test_names_tags_aliases_and_digests() -> None:
    old, new = entry("el9", "2025", "1"), entry("el9", "2026", "2", aliases=("alma",))
    latest, other = entry("el9", "latest", "2"), entry("deb", "1", "3", aliases=("el9", "stable"))
    entries = [old, new, latest, other]
    assert ask(entries, "el9:2025") is old
    assert ask(entries, "el9") is latest
    assert ask(entries, "alma") is new
    assert ask(entries, "deb") is other and ask(entries, "stable") is other
    assert ask(entries, "el9@sha256:" + "1" * 64) is old
    assert ask(entries, "stable@sha256:" + "3" * 64) is other


def test_two_tags_and_no_latest_are_ambiguous() -> None:
    with pytest.raises(AmbiguousImage) as caught:
        ask([entry("el9", "1", "1"), entry("el9", "2", "2")], "el9")
    assert "el9:1, el9:2" in caught.value.hint


def test_two_tags_of_one_digest_are_not_ambiguous() -> None:
    assert ask([entry("el9", "1"), entry("el9", "2")], "el9").tag == "1"


def test_an_alias_of_two_names_is_ambiguous() -> None:
    entries = [entry("el8", "latest", "1", aliases=("el",)), entry("el9", "latest", "2", aliases=("el",))]
    with pytest.raises(AmbiguousImage, match="image 'el': 2 images"):
        ask(entries, "el")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("debain12", "did you mean debian12?"),
        ("deb", "did you mean debian12?"),
        ("debian12:2020", "no such tag; there is latest"),
        ("debian12@sha256:" + "f" * 64, "no such digest; debian12:latest is sha256:aaaa"),
        ("zzz", "no such image; there is debian12, el9"),
    ],
)
def test_unknown_images_tell_what_there_is(text: str, said: str) -> None:
    with pytest.raises(UnknownImage) as caught:
        ask([entry("debian12"), entry("el9"), entry("secret", users=("bob",))], text)
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_an_empty_catalogue_says_so() -> None:
    with pytest.raises(UnknownImage, match="the catalogue is empty"):
        ask([], "el9")


def test_who_may_use_an_image() -> None:
    entries = [entry("mine", users=("alice",)), entry("cms", groups=("cms", "atlas"))]
    assert ask(entries, "mine", ALICE) and ask(entries, "cms", ALICE)
    assert ask(entries, "mine", ROOT) and ask(entries, "cms", ROOT)
    for name, who in (("mine", "alice"), ("cms", "group cms, group atlas")):
        with pytest.raises(ImageDenied, match=f"image '{name}': not for user 'bob'") as caught:
            ask(entries, name, BOB)
        assert caught.value.hint == f"it is for {who}"


def test_a_denied_tag_does_not_stand_in_the_way() -> None:
    entries = [entry("el9", "1", "1"), entry("el9", "2", "2", users=("bob",))]
    assert ask(entries, "el9").tag == "1"


def test_a_uid_without_a_name() -> None:
    assert User.of(3999999) == User(3999999, "3999999", ())
    assert User.of(0).name == "root" and "root" in User.of(0).groups
