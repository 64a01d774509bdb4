"""The request grammar, image references, mounts: parsed once, refused with value and wish."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wnodes_core import model, request
from wnodes_core.errors import BadRequest
from wnodes_core.model import Boot, Image, ImageRef, Job, Mount, Owner, Process, VmRequest, parse_size_mib


def test_doctests():
    assert doctest.testmod(model).failed == doctest.testmod(request).failed == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image", "image"),
        ("imgae=el9", "did you mean image=?"),
        ("colour=red", "want KEY=VALUE with one of"),
        ("cpus=0", "whole number"),
        ("cpus=-1", "whole number"),
        ("cpus=1,cpus=2", "given twice"),
        ("memory=much", "want a number with K, M, G or T"),
        ("memory=0", "want a number"),
        ("image=../../etc/passwd", "want NAME"),
        ("image=" + "x" * 5000, "want NAME"),
        ("image=a@sha256:12", "want NAME"),
        ("mount=data:/data", "source must be an absolute path"),
        ("mount=/data:data", "target must be an absolute path"),
        ("mount=/data:/../etc", "may not hold '..'"),
        ("mount=/a:/b:/c", "want SRC"),
        ("mount=/" + "x" * 5000, "4095"),
        ("network=a b", "want a name"),
        ("", "want KEY=VALUE"),
        ("image=$(id)", "want NAME"),
        ("image=a\nb", "want NAME"),
    ],
)
def test_malformed_options_are_refused_with_value_and_wish(text, words):
    with pytest.raises(BadRequest) as caught:
        VmRequest.parse(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 6000


path = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=40)


@given(path, path, st.booleans())
def test_any_legal_path_survives_the_grammar(source, target, read_only):
    mount = Mount(
        "/" + source.replace("/", "_").replace("..", "_"), "/" + target.replace("/", "_").replace("..", "_"), read_only
    )
    if mount.source in ("/.",) or mount.target in ("/.",):
        return
    assert VmRequest.parse(f"image=el9,mount={mount}").mounts == (mount,)


@given(st.text(max_size=200))
def test_the_grammar_never_raises_anything_else(text):
    try:
        VmRequest.parse(text)
    except BadRequest:
        pass


def test_requests_merge_and_two_images_clash():
    base = VmRequest.parse("image=el9,mount=/a")
    assert base.merged(VmRequest.parse("cpus=2,mount=/b")) == VmRequest.parse("image=el9,cpus=2,mount=/a,mount=/b")
    with pytest.raises(BadRequest, match="two images"):
        base.merged(VmRequest.parse("image=deb12"))


def test_a_request_survives_json():
    request = VmRequest.parse("image=el9:1,cpus=3,memory=2G,scratch=1G,network=vlan42,mount=/a:/b:ro")
    assert VmRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize("text", ["el9", "el9:2026.1", "a@sha256:" + "0" * 64])
def test_image_references_print_as_they_are_read(text):
    assert str(ImageRef.parse(text)) == text


def test_sizes_round_up_to_mib():
    assert [parse_size_mib(t) for t in ("1", "1025k", "2g", "1T", "3MiB")] == [1, 2, 2048, 1 << 20, 3]


def test_an_image_survives_json():
    from dataclasses import asdict

    image = Image("a", "b", "sha256:0", "/p", "qcow2", boot=Boot("/k", "/i", "root=/dev/vda"), facts={"os": "x"})
    assert Image.from_dict(asdict(image)) == image


def test_a_job_key_names_lrms_node_and_job():
    assert Job("slurm", "12", "n0", 1, 1, "u").key == "slurm-n0-12"


def test_owner_and_process_are_plain_values():
    process = Process(1, 0, 0, 5, "/sbin/init", ("init",))
    assert Owner("1", "batch", process, True) == Owner("1", "batch", process, True)
