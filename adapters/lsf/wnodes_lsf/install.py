"""What ``wnodes lsf install`` puts where: hooks into LSF_SERVERDIR, a queue into lsb.queues.

Contract read: lsf.conf(5), lsb.queues(5), lsf.shared(5) of LSF 10.1; a GPL descendant of LSF 4.2 as
observed. There is one eexec and one esub for the whole cluster: a site's own is moved aside and run by ours.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wnodes_core import tools
from wnodes_core.errors import SettingsError
from wnodes_lsf.task import EXIT_AGAIN

HERE = Path(__file__).parent
BEGIN, END = "# wnodes: begin (wnodes lsf install)", "# wnodes: end"
_SAFE = re.compile(r"/[A-Za-z0-9._/+@-]*\Z")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,38}\Z")
OURS = "wnodes_core.hookmain"  # a script that holds this is one of ours


@dataclass(frozen=True)
class Site:
    """Where things are and shall be. What goes into shell text is of plain characters only."""

    serverdir: Path
    queues_file: Path
    prefix: Path = Path("/usr/lib/wnodes/lsf")
    run_dir: Path = Path("/run/wnodes")
    python: str = sys.executable
    queue: str = "vm"
    apps: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    slots: bool = True
    generic: bool = False
    login: bool = False

    def __post_init__(self) -> None:
        for name in ("serverdir", "queues_file", "prefix", "run_dir", "python"):
            text = str(getattr(self, name))
            if not _SAFE.match(text):
                raise SettingsError(f"{name} {text!r}: want an absolute path of letters, digits and . _ / + @ -")
        for word in (self.queue, *self.apps, *self.images):
            if not _NAME.match(word):
                raise SettingsError(f"{word!r}: want a name of letters, digits and _, as LSF's names are")

    @property
    def marks(self) -> dict[str, str]:
        """What stands for what in the scripts."""
        words = f"queues={self.queue} apps={','.join(self.apps)} slots={'yes' if self.slots else 'no'}"
        words += " login=yes" if self.login else ""
        return {
            "@PYTHON@": self.python,
            "@RUN@": str(self.run_dir),
            "@PREFIX@": str(self.prefix),
            "@SITE@": words,
            "@IMAGES@": " ".join(self.images),
            # With application profiles a queue alone does not say whether a job has our JOB_STARTER.
            "@QUEUES@": "" if self.apps else self.queue,
        }


@dataclass(frozen=True)
class Step:
    """One file that shall be so; ``why`` is what a missing one costs. ``aside``: where a site's own goes first."""

    path: Path
    text: str
    why: str
    mode: int = 0o755
    aside: Path | None = None

    @property
    def done(self) -> bool:
        """Whether it is so already."""
        try:
            return self.path.read_text() == self.text and self.path.stat().st_mode & 0o777 == self.mode
        except (OSError, UnicodeDecodeError):
            return False

    def apply(self) -> None:
        """Make it so. Raises HostError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.aside and self.path.exists() and OURS not in self.path.read_text(errors="replace"):
            tools.write_atomic(self.aside, self.path.read_bytes(), mode=0o755)
        if self.path.name == "lsb.queues":
            saved = self.path.with_name(f"lsb.queues.wnodes-{time.strftime('%Y%m%d-%H%M%S')}")
            tools.write_atomic(saved, self.path.read_bytes(), mode=0o644)
        tools.write_atomic(self.path, self.text.encode(), mode=self.mode)


def plan(site: Site) -> list[Step]:
    """Every step, done or not; lsb.queues last, so that what it names is there. Raises SettingsError."""
    own = [
        Step(site.prefix / name, _script(site, name), f"{name} of the VM queue")
        for name in ("launch", "pre_exec", "post_exec")
    ]
    theirs = [_server(site, "eexec", "eexec", "wnodesd is not warned of a job before it starts"), _esub(site)]
    if site.slots:
        theirs.append(_server(site, "elim.wnodes", "elim.wnodes", "LSF does not know how many VMs a host can take"))
    if site.generic:
        theirs.append(_server(site, "esub", "esub", 'a cluster without bsub -a "name(args)" does not see the request'))
    return [*own, *theirs, *_queue_step(site)]


def _esub(site: Site) -> Step:
    return _server(site, "esub", "esub.wnodes", 'bsub -a "wnodes(...)" is refused or does nothing')


def _script(site: Site, name: str) -> str:
    text = (HERE / "hooks" / name).read_text()
    for mark, value in site.marks.items():
        text = text.replace(mark, value)
    return text


def _server(site: Site, script: str, name: str, why: str) -> Step:
    aside = site.prefix / f"{name}.site" if name in ("eexec", "esub") else None
    return Step(site.serverdir / name, _script(site, script), why, aside=aside)


def queue_lines(site: Site) -> dict[str, str]:
    """What makes a queue one of VMs."""
    return {
        "PRE_EXEC": str(site.prefix / "pre_exec"),
        "POST_EXEC": str(site.prefix / "post_exec"),
        "JOB_STARTER": f"exec {site.prefix / 'launch'} '%USRCMD'",
        "JOB_CONTROLS": "SUSPEND[SIGTSTP] RESUME[SIGCONT]",
        "REQUEUE_EXIT_VALUES": str(EXIT_AGAIN),
    }


def snippet(site: Site, kind: str = "Queue") -> str:
    """The queue for lsb.queues, or with ``Application`` a profile for lsb.applications."""
    name = "QUEUE_NAME" if kind == "Queue" else "NAME"
    words = {name: site.queue if kind == "Queue" else (site.apps or ("vm",))[0], **queue_lines(site)}
    words["DESCRIPTION"] = "each job in its own virtual machine"
    if kind == "Application":
        words["JOB_INCLUDE_POSTPROC"] = "Y"
    return f"Begin {kind}\n" + "".join(f"{key} = {value}\n" for key, value in words.items()) + f"End {kind}\n"


def resource_lines(site: Site) -> str:
    """For lsf.shared and the ResourceMap of lsf.cluster.NAME; a person adds them."""
    names = ["vmslots", *(f"{kind}_{name}" for name in site.images for kind in ("img", "tmpl"))]
    shared = "".join(f"{name}  Numeric  15  N  (wnodes)\n" for name in names)
    mapped = "".join(f"{name}  [default]\n" for name in names)
    return f"# lsf.shared, in Begin Resource:\n{shared}# lsf.cluster.NAME, in Begin ResourceMap:\n{mapped}"


def without_ours(text: str) -> str:
    """A lsb.queues as the site wrote it."""
    return re.sub(rf"(?ms)^{re.escape(BEGIN)}\n.*?^{re.escape(END)}\n", "", text)


def _queue_step(site: Site) -> Iterator[Step]:
    try:
        text = site.queues_file.read_text()
    except OSError as error:
        hint = "name it with --queues; it lies in LSF_ENVDIR/lsbatch/CLUSTER/configdir"
        raise SettingsError(
            f"{site.queues_file}: {error.strerror}: want the cluster's lsb.queues", hint=hint
        ) from error
    own = without_ours(text)
    found = _queue_of(own, site.queue)
    if found is None:
        newline = "" if own.endswith("\n") or not own else "\n"
        wanted = f"{own}{newline}{BEGIN}\n{snippet(site)}{END}\n"
        mode = site.queues_file.stat().st_mode & 0o777
        yield Step(site.queues_file, wanted, f"no queue {site.queue} starts its jobs in VMs", mode)
        return
    wrong = [f"{key} = {value}" for key, value in queue_lines(site).items() if not _says(found, key, value)]
    if wrong:
        hint = "; ".join(wrong)
        raise SettingsError(
            f"{site.queues_file}: queue {site.queue} is the site's own: want these lines in it", hint=hint
        )


def _queue_of(text: str, name: str) -> dict[str, str] | None:
    for block in re.findall(r"(?ms)^\s*Begin Queue\s*$(.*?)^\s*End Queue\s*$", text):
        pairs = [
            line.partition("=") for line in block.splitlines() if "=" in line and not line.lstrip().startswith("#")
        ]
        queue = {key.strip().upper(): value.strip() for key, _, value in pairs}
        if queue.get("QUEUE_NAME") == name:
            return queue
    return None


def _says(queue: dict[str, str], key: str, value: str) -> bool:
    have = queue.get(key, "")
    if key == "REQUEUE_EXIT_VALUES":
        return value in re.split(r"[\s(),]+", have)
    return value in have if key in ("PRE_EXEC", "POST_EXEC") else have == value


def remove(site: Site) -> list[str]:
    """Take all of it out; a site's own esub and eexec go back. What was done, in words."""
    done = []
    for name in ("esub.wnodes", "elim.wnodes", "eexec", "esub"):
        path, aside = site.serverdir / name, site.prefix / f"{name}.site"
        if path.exists() and (OURS in path.read_text(errors="replace") or name == "elim.wnodes"):
            path.unlink()
            done.append(f"removed {path}")
        if aside.exists():
            tools.write_atomic(path, aside.read_bytes(), mode=0o755)
            aside.unlink()
            done.append(f"restored {path}")
    text = site.queues_file.read_text() if site.queues_file.exists() else ""
    if without_ours(text) != text:
        tools.write_atomic(site.queues_file, without_ours(text).encode(), mode=site.queues_file.stat().st_mode & 0o777)
        done.append(f"restored {site.queues_file}")
    for name in ("launch", "pre_exec", "post_exec"):
        (site.prefix / name).unlink(missing_ok=True)
    with suppress(OSError):
        site.prefix.rmdir()
    return done
