"""The frame parser and the guest's JSON, on both sides."""

from __future__ import annotations

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wnodes_core.guest import bundle, channel, frames, guest_json


def parse(data: bytes, cuts: list[int], limit: int = 4096, size: int = 64) -> list[tuple[int, int, int, bytes]]:
    """What a parser makes of ``data`` that arrives in pieces."""
    parser, found, index = frames.Parser(limit, size), [], 0
    while data:
        space = parser.space()
        assert len(space) > 0
        count = min(len(space), len(data), max(1, cuts[index % len(cuts)]) if cuts else len(space))
        space[:count] = data[:count]
        data, index = data[count:], index + 1
        found += [(kind, sub, stream, bytes(payload)) for kind, sub, stream, payload in parser.received(count)]
    return found


def joined(found: list[tuple[int, int, int, bytes]]) -> list[tuple[int, int, int, bytes]]:
    """Neighbouring DATA of one stream put together: DATA may come in pieces."""
    out: list[tuple[int, int, int, bytes]] = []
    for kind, sub, stream, payload in found:
        if kind == frames.DATA and out and out[-1][:3] == (kind, sub, stream):
            out[-1] = (kind, sub, stream, out[-1][3] + payload)
        else:
            out.append((kind, sub, stream, payload))
    return out


FRAME = st.one_of(
    st.tuples(
        st.sampled_from([frames.DATA, *range(5, 10)]),
        st.integers(0, 2),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=300),
    ),
    st.tuples(st.sampled_from([2, 3, 4]), st.integers(0, 2), st.integers(0, 2**32 - 1), st.binary(max_size=4)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(FRAME, max_size=20), st.lists(st.integers(1, 90), max_size=8))
def test_frames_survive_any_cutting(wanted, cuts):
    data = b"".join(frames.pack(*frame) for frame in wanted)
    assert joined(parse(data, cuts)) == joined(wanted)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.lists(st.integers(1, 90), max_size=5))
def test_garbage_ends_in_protocol_error_or_frames(data, cuts):
    try:
        found = parse(data, cuts)
    except frames.ProtocolError:
        return
    assert sum(len(frame[3]) for frame in found) <= len(data)


@pytest.mark.parametrize(
    "head",
    [
        (0, 0, 0, 1, 0),
        (10, 0, 0, 1, 0),
        (1, 3, 0, 1, 0),
        (1, 0, 1, 1, 0),
        (frames.DATA, 0, 0, 1, frames.MAX_DATA + 1),
        (frames.EXIT, 0, 0, 1, 4097),
        (frames.CREDIT, 0, 0, 1, 5),
    ],
)
def test_a_bad_header_is_refused(head):
    with pytest.raises(frames.ProtocolError):
        parse(frames.HEADER.pack(*head), [])


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1\0"])
def test_bad_credit_is_refused(payload):
    with pytest.raises(frames.ProtocolError):
        frames.amount_of(payload)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary(max_size=20).map(lambda b: b.decode("utf-8", "surrogateescape")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_the_two_jsons_understand_each_other(value):
    assert guest_json.loads(channel.encode({"value": value})) == {"value": value}
    assert json.loads(guest_json.dumps({"value": value})) == {"value": value}


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"9" * 6000])
def test_bad_json_of_the_guest_is_a_protocol_error(payload):
    with pytest.raises(frames.ProtocolError):
        channel.decode(payload)


@pytest.mark.parametrize("name", [*(f"{name}.py" for name in (*bundle.MODULES, *bundle.RESTING)), "guest_bootstrap", "guest_shim.py"])
def test_what_runs_in_the_guest_is_python_3_6_without_the_modules_minimal_lacks(name):
    text = bundle.read(name)
    tree = ast.parse(bundle.plain(text) if name.endswith(".py") else text, feature_version=(3, 6))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    minimal = {
        "array",
        "binascii",
        "collections",
        "errno",
        "fcntl",
        "gc",
        "hashlib",
        "os",
        "select",
        "signal",
        "socket",
        "stat",
        "struct",
        "sys",
        "time",
        "zlib",
    }
    # resource and _ctypes: tried, with prlimit(1) and mount(8) behind them
    assert imported <= minimal | {"wnodes_core", "resource", "_ctypes"}


def test_a_bundle_holds_no_annotation():
    assert "from __future__" not in bundle.agent_source().decode()
    assert len(bundle.agent_source()) < 64 << 10
