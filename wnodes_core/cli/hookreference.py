"""docs/hooks.md: headings, arguments and sentences from the hookspecs, samples as they stand on the page.

The specs are the one source: what the page says of an argument cannot drift from them. Samples are
written on the page by hand, one below each hook, and kept; a hook without one is told by the tests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from wnodes_core import hookspecs

# In this order: samples further down use what those above define.
_TITLES = {
    "lrms": "Batch systems and policy",
    "image": "Images and disks",
    "storage": "Storage",
    "network": "Networks",
    "vm": "Hypervisors and observers",
    "template": "Warm start",
    "volume": "Volumes and plugged disks",
}
_FIELD = re.compile(r":(param|returns|raises)\s*([^:]*):\s*(.*)", re.DOTALL)


def page(old: str) -> str:
    """The page anew; its beginning and its samples are taken from ``old``."""
    head = old.partition("\n## ")[0].rstrip() + "\n"
    samples = _samples(old)
    titles = list(_TITLES)
    modules = sorted(hookspecs.ALL, key=lambda module: titles.index(_subject(module)))
    return head + "".join(_section(module, samples) for module in modules)


def _subject(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _functions(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    return ((name, f) for name, f in vars(module).items() if name.startswith("wnodes_") and inspect.isfunction(f))


def _samples(old: str) -> dict[str, str]:
    """What stands below each hook's facts: from its first fence on."""
    found = {}
    for part in re.split(r"(?m)^### `", old)[1:]:
        name = part.partition("(")[0]
        fence = part.find("\n```")
        if fence >= 0:
            found[name] = part[fence + 1 :].partition("\n## ")[0].rstrip() + "\n"
    return found


def _section(module: ModuleType, samples: dict[str, str]) -> str:
    text = f"\n## {_TITLES[_subject(module)]}\n"
    for name, function in _functions(module):
        text += _hook(name, function) + (f"\n{samples[name]}" if name in samples else "")
    return text


def _hook(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    options = getattr(function, "wnodes_spec", None) or {}
    told, *fields = re.split(r"\n(?=:)", inspect.getdoc(function) or "")
    asked = "First answer" if options.get("firstresult") else "All"
    lines = [f"\n### `{name}({', '.join(signature.parameters)})`\n", f"{_words(told)} *{asked}.*\n"]
    lines += [_argument(kind, what, text, signature) for kind, what, text in map(_parts, fields)]
    if not any(kind == "returns" for kind, _, _ in map(_parts, fields)):
        lines.append(f"- returns `{signature.return_annotation}`")
    return "\n".join(lines) + "\n"


def _parts(text: str) -> tuple[str, str, str]:
    match = _FIELD.match(text)
    assert match, f"want :param NAME:, :returns: or :raises NAME:, found {text!r}"
    return match[1], match[2].strip(), _words(match[3])


def _argument(kind: str, what: str, text: str, signature: inspect.Signature) -> str:
    if kind == "param":
        return f"- `{what}` (`{signature.parameters[what].annotation}`): {text}"
    if kind == "returns":
        return f"- returns (`{signature.return_annotation}`): {text}"
    return f"- raises `{what}`: {text}"


def _words(text: str) -> str:
    """One line, in Markdown's spelling."""
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs).replace("``", "`")
