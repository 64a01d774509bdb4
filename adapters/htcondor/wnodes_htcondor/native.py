"""What HTCondor's texts say: text in, objects out. No I/O; every user-written word is distrusted.

Formats as HTCondor 23.9.6 and 25.14 write them (captured in tests/captured/): ``.job.ad`` and
``.machine.ad`` in the "long" ClassAd form, one ``Name = expression`` a line; the argv of a container
runtime as the starter composes it for ``SINGULARITY``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from wnodes_core.api import ImageRef, VmRequest, errors

Value = str | int | float | bool | None
PREFIX = "wnodes:"
MAX_AD = 1 << 20

_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)[ \t]*=[ \t]*(.*?)[ \t\r]*\Z")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\Z', re.DOTALL)
_INTEGER = re.compile(r"[-+]?\d{1,19}\Z")
_REAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?\Z")
_WORDS: dict[str, Value] = {"true": True, "false": False, "undefined": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"}
_SLOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
# Options of apptainer's that the starter writes with their value as the next word.
_WITH_VALUE = frozenset(("-S", "--scratch", "-W", "--workdir", "--pwd", "--cwd", "-B", "--bind", "--home", "-H"))


def parse_ad(text: str) -> dict[str, Value]:
    r"""The literal attributes of an ad, by their names in lower case; expressions are left out.

    >>> parse_ad('ProcId = 0\nvm_image = "el9"\nRequirements = TARGET.Cpus > 1')
    {'procid': 0, 'vm_image': 'el9'}

    Raises BadRequest for a line that is no attribute, and for a name that stands there twice.
    """
    found: dict[str, Value] = {}
    seen: set[str] = set()
    for line in text.split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if not match:
            raise errors.BadRequest(f"ClassAd line {line[:80]!r}: want NAME = EXPRESSION")
        name = match[1].lower()
        if name in seen:
            raise errors.BadRequest(f"ClassAd attribute {match[1][:80]!r} stands there twice: want it once")
        seen.add(name)
        known, value = literal(match[2])
        if known:
            found[name] = value
    return found


def literal(text: str) -> tuple[bool, Value]:
    r"""Whether this is a literal, and its value.

    >>> literal('"a \\"b\\""'), literal("1.5"), literal("strcat(A, B)")
    ((True, 'a "b"'), (True, 1.5), (False, None))
    """
    string = _STRING.match(text)
    if string:
        return True, re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), string[1], flags=re.DOTALL)
    if text.lower() in _WORDS:
        return True, _WORDS[text.lower()]
    if _INTEGER.match(text):
        return True, int(text)
    return (True, float(text)) if _REAL.match(text) else (False, None)


def quoted(text: str, limit: int = 400) -> str:
    r"""Text as a ClassAd string: one line, no control characters, bounded.

    >>> quoted('image "x"\n  hint: y')
    '"image \\"x\\" hint: y"'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]
    return '"' + line.replace("\\", "\\\\").replace('"', '\\"') + '"'


def string_of(ad: Mapping[str, Value], name: str) -> str:
    """A text of the ad, or ''. Raises BadRequest if it is of another type."""
    value = ad.get(name.lower())
    if value is None:
        return ""
    if not isinstance(value, str):
        raise errors.BadRequest(f"{name} = {value!r}: want text in double quotes")
    return value


def number_of(ad: Mapping[str, Value], name: str) -> int:
    """A whole number of the ad that is not negative, or 0."""
    value = ad.get(name.lower())
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 40 else 0


def request_from(ad: Mapping[str, Value]) -> VmRequest | None:
    """The wish in a job's ad (``vm_image = …`` and ``vm = "…"`` of the submit file), or None.

    >>> request_from({"vm_image": "el9", "vm": "cpus=2"}).cpus
    2

    Raises BadRequest.
    """
    image, text = string_of(ad, "VM_Image").strip(), string_of(ad, "VM").strip()
    if not (image or text):
        return None
    request = VmRequest.parse(text) if text else VmRequest()
    return request.merged(VmRequest(image=str(ImageRef.parse(image)))) if image else request


def job_id(ad: Mapping[str, Value]) -> str:
    """``CLUSTER.PROC``. Raises BadRequest."""
    cluster, proc = ad.get("clusterid"), ad.get("procid")
    if type(cluster) is not int or type(proc) is not int or cluster < 1 or proc < 0:
        raise errors.BadRequest(f"job ad with ClusterId {cluster!r}, ProcId {proc!r}: want two whole numbers")
    return f"{cluster}.{proc}"


def slot_of(command: Sequence[str]) -> str:
    """The slot in a starter's argv (``condor_starter -f … -a slot1_1 HOST``), or ''.

    >>> slot_of(("condor_starter", "-f", "-local-name", "slot_type_1", "-a", "slot1_1", "host"))
    'slot1_1'
    """
    words = list(command)
    name = words[words.index("-a") + 1] if "-a" in words[:-1] else ""
    return name if _SLOT.match(name) else ""


def slot_ad(text: str, slot: str) -> dict[str, Value] | None:
    r"""The ad of one slot out of ``condor_who -long``, or None if it runs no job.

    >>> slot_ad('Name = "slot1_1@n0"\nJobId = "3.0"\n\nName = "slot1_2@n0"', "slot1_2")
    {'name': 'slot1_2@n0'}
    """
    ads = (parse_ad(part) for part in re.split(r"\n\s*\n", text) if part.strip())
    found = [ad for ad in ads if str(ad.get("name", "")).partition("@")[0] == slot]
    return found[0] if len(found) == 1 else None


def account_of(slot: Mapping[str, Value]) -> str:
    """The accounting group of the job in this slot, without the user's own name at its end.

    >>> account_of({"accountinggroup": "phys.cms.ann@x", "remoteowner": "ann@x"}), account_of({})
    ('phys.cms', '')
    """
    group, owner = (string_of(slot, name).partition("@")[0] for name in ("AccountingGroup", "RemoteOwner"))
    return group.removesuffix(f".{owner}") if group != owner else ""


class RuntimeCall(NamedTuple):
    """One call of the container runtime: ``verb`` '' if it is none that we know."""

    verb: str
    image: str
    command: tuple[str, ...]
    options: tuple[tuple[str, str], ...]

    def option(self, *names: str) -> str:
        """The value of the last such option, or ''."""
        return next((value for name, value in reversed(self.options) if name in names), "")


def runtime_call(words: Sequence[str]) -> RuntimeCall:
    """Verb, image and command in the argv of a container runtime, without its own name.

    >>> call = runtime_call("-s exec -W /x --pwd /x -B /x -C --wnodes wnodes:el9 /x/job a".split())
    >>> call.verb, call.image, call.command, call.option("--pwd")
    ('exec', 'wnodes:el9', ('/x/job', 'a'), '/x')
    """
    verb, options, rest = "", [], list(words)
    while rest:
        word = rest.pop(0)
        if word in _WITH_VALUE and rest:
            options.append((word, rest.pop(0)))
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            options.append((name, value))
        elif not verb:
            verb = word
        else:
            return RuntimeCall(verb, word, tuple(rest), tuple(options))
    return RuntimeCall(verb, "", (), tuple(options))


def guest_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The job's own variables: the starter hands each to the runtime under a prefix.

    >>> guest_environment({"SINGULARITYENV_A": "1", "A": "1", "APPTAINERENV_B": "2", "C": "3"})
    {'A': '1', 'B': '2'}
    """
    prefixes = ("SINGULARITYENV_", "APPTAINERENV_")
    return {k[len(p) :]: v for p in prefixes for k, v in environ.items() if k.startswith(p) and len(k) > len(p)}


def advertised(text: str, alive: bool) -> str:
    """The machine's attributes for what wnodesd's ``RUN_DIR/capacity`` says; the last line publishes them at once.

    >>> print(advertised("accel kvm\\nslots 3\\nimage el9\\nreference el9:1\\ntemplate el9\\n", True), end="")
    HasWnodes = true
    WnodesAccel = "kvm"
    WnodesFreeVMs = 3
    WnodesImages = {"el9", "el9:1"}
    WnodesWarm = {"el9"}
    - update:true
    """
    facts = [line.partition(" ")[::2] for line in text.splitlines()] if alive else []
    told = {key: [value for name, value in facts if name == key] for key, _ in facts}
    accel, slots = (told.get(key, [""])[0] for key in ("accel", "slots"))
    lines = [
        f"HasWnodes = {'true' if accel else 'false'}",
        f"WnodesAccel = {quoted(accel)}",
        f"WnodesFreeVMs = {slots if slots.isdecimal() else 0}",
        f"WnodesImages = {_list([*told.get('image', ()), *told.get('reference', ())])}",
        f"WnodesWarm = {_list(told.get('template', ()))}",
        "- update:true",
    ]
    return "".join(f"{line}\n" for line in lines)


def _list(texts: Sequence[str]) -> str:
    return "{" + ", ".join(map(quoted, texts)) + "}"
