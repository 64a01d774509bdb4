"""JSON for the guest's side: Debian's python3-minimal has no ``json`` module.

Strings carry arbitrary bytes of paths and environments as lone surrogates (PEP 383).
"""
# ruff: noqa: SIM105, UP031 - guest code, Python 3.6; contextlib costs an import there

from __future__ import annotations

_NAMES: dict[str, object] = {"true": True, "false": False, "null": None, "__builtins__": {}}
_ESCAPES = {code: "\\u%04x" % code for code in range(32)}
_ESCAPES.update({34: '\\"', 92: "\\\\"})


def loads(data: bytes) -> object:
    """The host's JSON as a value. The host owns this guest, it sent this very code: no distrust."""
    return eval(data.decode("utf-8"), dict(_NAMES))  # every JSON text is a Python expression


def dumps(value: object) -> bytes:
    """A value as JSON in UTF-8."""
    return _text(value).encode("utf-8", "backslashreplace")


def _text(value: object) -> str:
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return '"' + value.translate(_ESCAPES) + '"'
    if isinstance(value, dict):
        return "{" + ",".join(_text(str(key)) + ":" + _text(item) for key, item in value.items()) + "}"
    return "[" + ",".join(_text(item) for item in value) + "]"  # type: ignore[attr-defined]
