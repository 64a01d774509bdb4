"""What a clone says of itself is held against what it was told and against its template's; no lie passes."""

from __future__ import annotations

import time

import pytest

from wnodes_core.errors import IdentityError
from wnodes_core.guest import bundle, identity

OLD = {
    "machine_id": "a" * 32,
    "boot_id": "11111111-2222-4333-8444-555555555555",
    "host_name": "template",
    "ssh_host_keys": "1" * 64,
    "random_seed": "2" * 64,
    "random": "3" * 64,
    "leases": "4" * 64,
    "instance_id": "i-old",
}
DIGEST = "5" * 64


def honest(asked, **more):
    """What a clone answers that became what it was asked to be."""
    given = {name: asked[name] for name in identity.GIVEN}
    drawn = {"ssh_host_keys": "", "random_seed": DIGEST, "random": "6" * 64, "leases": "", "instance_id": "i-new"}
    return {"identity": {**given, **drawn, **more}, "clock": asked["clock"] + 0.1, "boot_id": asked["boot_id"]}


@pytest.fixture
def asked():
    return identity.ask("wn-7")


def test_who_became_what_it_was_asked_passes(asked):
    identity.check(OLD, asked, honest(asked))
    assert identity.of({"identity": OLD}) == OLD


def test_no_two_are_asked_to_be_the_same():
    names = ("entropy", "machine_id", "boot_id")
    several = [identity.ask("wn-7") for _ in range(20)]
    assert all(len({each[name] for each in several}) == 20 for name in names)


@pytest.mark.parametrize("name", [*identity.GIVEN, *identity.DRAWN])
@pytest.mark.parametrize("value", ["MISSING", None, 7, True, ["x"], {}, "x" * 1_000_000, "TEMPLATE"], ids=lambda x: repr(x)[:10])
def test_no_item_may_be_missing_odd_huge_or_the_templates(asked, name, value):
    told = honest(asked)
    told["identity"][name] = OLD[name] if value == "TEMPLATE" else value
    if value == "MISSING":
        del told["identity"][name]
    with pytest.raises(IdentityError, match=name) as caught:
        identity.check(OLD, asked, told)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("said", [None, "me", [], 3, {}])
def test_an_identity_that_is_none_is_refused(asked, said):
    with pytest.raises(IdentityError, match=r"clone: (it says no identity|machine_id is None)"):
        identity.check(OLD, asked, {"identity": said, "clock": time.time()})
    with pytest.raises(IdentityError):
        identity.of({"identity": said})
    with pytest.raises(IdentityError, match="no identity"):
        identity.of({})


@pytest.mark.parametrize("name", identity.GIVEN)
@pytest.mark.parametrize("value", ["", "somebody-else", "wn-7\n", "WN-7"])
def test_what_was_given_is_taken_to_the_letter(asked, name, value):
    with pytest.raises(IdentityError, match=f"{name} is"):
        identity.check(OLD, asked, honest(asked, **{name: value}))


@pytest.mark.parametrize("random", ["", "0", "6" * 63, "g" * 64, "6" * 65, "ECHO"])
def test_a_random_number_is_drawn_and_not_repeated(asked, random):
    random = asked["entropy"][:64] if random == "ECHO" else random
    with pytest.raises(IdentityError, match="random"):
        identity.check(OLD, asked, honest(asked, random=random))


@pytest.mark.parametrize("name", ["boot_id", "host_name"])
def test_the_kernels_own_names_agree(asked, name):
    with pytest.raises(IdentityError, match=f"its kernel's {name} is"):
        identity.check(OLD, asked, {**honest(asked), name: OLD[name]})


@pytest.mark.parametrize("clock", [None, "now", True, float("nan"), float("inf"), [], 10**400, -(10**400)], ids=lambda x: str(x)[:8])
def test_a_clock_is_a_number_of_seconds(asked, clock):
    with pytest.raises(IdentityError, match="clock"):
        identity.check(OLD, asked, {**honest(asked), "clock": clock})


@pytest.mark.parametrize("off", [-3600, -2.5, 3, 86400 * 365])
def test_a_clock_that_stood_still_or_jumped_is_refused(asked, off):
    with pytest.raises(IdentityError, match=f"its clock is off by [{'-' if off < 0 else '+'}]"):
        identity.check(OLD, asked, {**honest(asked), "clock": time.time() + off})


def test_a_slow_waking_is_no_wrong_clock(asked):
    asked["clock"] -= 12  # it took so long; the guest set its clock somewhere on the way
    for clock in (asked["clock"] - 1.5, asked["clock"] + 5, time.time() + 1.5):
        identity.check(OLD, asked, {**honest(asked), "clock": clock})


def test_the_agents_digest_follows_its_files(monkeypatch):
    before = bundle.agent_digest()
    assert len(before) == 64 and bundle.agent_digest() == before
    read = bundle.read
    for name in ("guest_identity.py", "frames.py", "guest_bootstrap", "bundle.py"):
        bundle.agent_digest.cache_clear()
        monkeypatch.setattr(bundle, "read", lambda path, name=name: read(path) + ("\n" if path == name else ""))
        assert bundle.agent_digest() != before, name
    monkeypatch.undo()
    bundle.agent_digest.cache_clear()
    assert bundle.agent_digest() == before
