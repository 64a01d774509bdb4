"""Errors are verdicts, and they survive a socket."""

import pytest

from wnodes_core import errors
from wnodes_core.errors import CommandError, Verdict, WnodesError, from_dict


def every_error(cls=WnodesError):
    yield cls
    for child in cls.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("kind", [k for k in every_error() if k is not CommandError])
def test_an_error_crosses_a_socket_with_kind_message_and_hint(kind):
    back = from_dict(kind("image 'x': want a name", hint="see list").to_dict())
    assert type(back) is kind
    assert (back.message, back.hint, back.verdict) == ("image 'x': want a name", "see list", kind.verdict)


def test_only_host_errors_drain():
    drains = {k for k in every_error() if k.verdict is Verdict.DRAIN}
    assert drains == set(every_error(errors.HostError))


def test_unknown_kind_is_held_not_trusted():
    assert from_dict({"kind": "os.system", "message": "m"}).verdict is Verdict.HOLD
    assert from_dict({}).message == "no message"


def test_the_tree_in_the_docstring_names_every_error():
    for kind in every_error():
        assert kind.__name__ in (errors.__doc__ or "")


def test_a_command_error_keeps_the_end_of_stderr():
    error = CommandError(["qemu-img", "create"], 1, "x" * 5000 + "no space")
    assert error.message.startswith("qemu-img: exit code 1: ")
    assert error.message.endswith("no space") and len(error.message) < 700
