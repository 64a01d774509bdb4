"""What ``wnodes slurm install`` puts where: a plan of files, made from what the site has.

Contract read: slurm.conf(5), plugstack in spank(7), Slurm 22.05.8. Before 23.11 ``Prolog=`` may stand
once only, so a site's own script and ours are run through a glob over a folder of links.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wnodes_core import tools
from wnodes_core.errors import CommandError, HostError, SettingsError
from wnodes_slurm import slurmconf

HERE = Path(__file__).parent
SCRIPTS = ("prolog", "epilog", "healthcheck", "launch")
_SAFE = re.compile(r"/[A-Za-z0-9._/+@-]*\Z")


@dataclass(frozen=True)
class Site:
    """Where things are and shall be. Paths go into shell text and a plugstack line: plain characters only."""

    slurm_conf: Path
    prefix: Path = Path("/usr/lib/wnodes/slurm")
    run_dir: Path = Path("/run/wnodes")
    python: str = sys.executable

    def __post_init__(self) -> None:
        for name in ("slurm_conf", "prefix", "run_dir", "python"):
            text = str(getattr(self, name))
            if not _SAFE.match(text) or len(text) > 110:
                raise SettingsError(f"{name} {text!r}: want an absolute path of letters, digits and . _ / + @ -")

    @property
    def state(self) -> Path:
        """Where wnodesd leaves the markers JOBID.NODE."""
        return self.run_dir / "slurm"

    @property
    def library(self) -> Path:
        """The built SPANK plug-in."""
        return self.prefix / "wnodes_vm.so"

    @property
    def plugstack_line(self) -> str:
        """Our line of plugstack.conf; ``required``, because ``optional`` would run the job on the bare host."""
        return f"required {self.library} run={self.prefix / 'launch'} state={self.state}"


@dataclass(frozen=True)
class Step:
    """One file (or link) that shall be so; ``why`` is what a missing one costs."""

    path: Path
    text: str
    why: str
    mode: int = 0o644
    link: bool = False

    @property
    def done(self) -> bool:
        """Whether it is so already."""
        if self.link:
            return self.path.is_symlink() and os.readlink(self.path) == self.text
        try:
            return self.path.read_text() == self.text and self.path.stat().st_mode & 0o777 == self.mode
        except OSError:
            return False

    def apply(self) -> None:
        """Make it so; a site's file is first copied to ``NAME.wnodes-TIME``. Raises HostError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.link:
            self.path.unlink(missing_ok=True)
            self.path.symlink_to(self.text)
            return
        if self.path.exists() and self.path.suffix == ".conf":
            saved = self.path.with_name(f"{self.path.name}.wnodes-{time.strftime('%Y%m%d-%H%M%S')}")
            tools.write_atomic(saved, self.path.read_bytes(), mode=self.path.stat().st_mode & 0o777)
        tools.write_atomic(self.path, self.text.encode(), mode=self.mode)


def plan(site: Site) -> list[Step]:
    """Every step, done or not. Raises SettingsError where a person must decide."""
    text = _read_conf(site)
    steps = [_script(site, name) for name in SCRIPTS]
    wanted = dict(_wanted(site, text))
    for key in ("Prolog", "Epilog"):
        steps += _chain(site, key, wanted)
    plugstack, content = _plugstack(site, text)
    why = "without it --vm-image is unknown to sbatch and no job lands in a VM"
    steps.append(Step(plugstack, content, why, _mode(plugstack)))
    missing = ", ".join(k for k, v in wanted.items() if slurmconf.value_of(text, k) != v)
    steps.append(Step(site.slurm_conf, slurmconf.with_ours(text, wanted), f"sets {missing}", _mode(site.slurm_conf)))
    return steps


def remove_prefix(site: Site) -> None:
    """Remove what we put below ``site.prefix``, and the folder if nothing else is in it."""
    for name in (*SCRIPTS, "wnodes_vm.so", "wnodes_vm.slurm"):
        (site.prefix / name).unlink(missing_ok=True)
    for folder in (site.prefix / "prolog.d", site.prefix / "epilog.d", site.prefix):
        (folder / "60-site").unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def removal(site: Site) -> list[Step]:
    """The site's own text back in its two files."""
    text = _read_conf(site)
    plugstack = _plugstack(site, text)[0]
    files = (site.slurm_conf, plugstack)
    texts = ((path, path.read_text()) for path in files if path.exists())
    return [Step(path, slurmconf.without_ours(old), "restored", _mode(path)) for path, old in texts]


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777 if path.exists() else 0o644


def _read_conf(site: Site) -> str:
    try:
        text = site.slurm_conf.read_text()
        for name in re.findall(r"^[ \t]*include[ \t]+(\S+)", text, re.MULTILINE | re.IGNORECASE):
            _must_not_set(site.slurm_conf.parent / name)
        return text
    except OSError as error:
        hint = "name it with --slurm-conf"
        raise SettingsError(f"{site.slurm_conf}: {error.strerror}: want the cluster's slurm.conf", hint=hint) from error


def _must_not_set(included: Path) -> None:
    text = included.read_text() if included.exists() else ""
    for key in ("Prolog", "Epilog", "PrologFlags", "LaunchParameters", "HealthCheckProgram", "PlugStackConfig"):
        if slurmconf.value_of(text, key):
            raise SettingsError(f"{included}: sets {key}, and slurm.conf includes it: want {key} in slurm.conf itself")


def _script(site: Site, name: str) -> Step:
    text = (HERE / "hooks" / name).read_text()
    for mark, value in (("@PYTHON@", site.python), ("@RUN@", str(site.run_dir))):
        text = text.replace(mark, value)
    return Step(site.prefix / name, text, f"hook {name}", 0o755)


def _wanted(site: Site, text: str) -> list[tuple[str, str]]:
    own = slurmconf.without_ours(text)
    flags = slurmconf.value_of(own, "PrologFlags")
    if "serial" in flags.lower().split(","):
        hint = "Serial runs one Prolog or Epilog at a time: VM jobs would wait for each other's ends"
        raise SettingsError(f"{site.slurm_conf}: PrologFlags={flags}: want it without Serial", hint=hint)
    wanted = [(key, _hook_value(site, own, key)) for key in ("Prolog", "Epilog")]
    wanted.append(("PrologFlags", slurmconf.united(flags, "Alloc,DeferBatch,Contain")))
    parameters = slurmconf.value_of(own, "LaunchParameters")
    wanted.append(("LaunchParameters", slurmconf.united(parameters, "use_interactive_step")))
    if not slurmconf.value_of(own, "HealthCheckProgram"):
        wanted.append(("HealthCheckProgram", str(site.prefix / "healthcheck")))
        wanted += [("HealthCheckInterval", "60"), ("HealthCheckNodeState", "ANY")]
    return wanted


def _hook_value(site: Site, own: str, key: str) -> str:
    """Ours alone, the site's own glob (we add a link to its folder), or a folder of both."""
    lines = slurmconf.count_of(own, key)
    if lines > 1:
        hint = f"add a line {key}={site.prefix / key.lower()} beside them and run this again with --check"
        raise SettingsError(f"{site.slurm_conf}: {key}= stands {lines} times: want it edited by hand", hint=hint)
    have = slurmconf.value_of(own, key)
    if not have:
        return str(site.prefix / key.lower())
    if not set(have) & set("*?["):
        return f"{site.prefix}/{key.lower()}.d/*"
    if not fnmatch.fnmatchcase(_link_name(have), have.rpartition("/")[2]):
        raise SettingsError(f"{site.slurm_conf}: {key}={have}: want a glob that a file 50-wnodes can match")
    return have


def _link_name(glob: str) -> str:
    return "50-wnodes" + glob.rpartition("/")[2].rpartition("*")[2]


def _chain(site: Site, key: str, wanted: dict[str, str]) -> list[Step]:
    if "*" not in wanted[key]:
        return []
    folder = Path(wanted[key]).parent
    steps = [Step(folder / _link_name(wanted[key]), str(site.prefix / key.lower()), f"{key} of VM jobs", link=True)]
    own = slurmconf.value_of(slurmconf.without_ours(_read_conf(site)), key)
    if "*" not in own:
        steps.append(Step(folder / "60-site", own, f"the site's own {key}", link=True))
    return steps


def _plugstack(site: Site, text: str) -> tuple[Path, str]:
    own = slurmconf.value_of(text, "PlugStackConfig")
    path = Path(own) if own else site.slurm_conf.with_name("plugstack.conf")
    old = slurmconf.without_ours(path.read_text()) if path.exists() else ""
    newline = "" if old.endswith("\n") or not old else "\n"
    return path, f"{old}{newline}{slurmconf.BEGIN}\n{site.plugstack_line}\n{slurmconf.END}\n"


def build(site: Site) -> None:
    """Compile the SPANK plug-in against the Slurm of this host. Raises HostError with the compiler's words."""
    library = site.library
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(".new")
    flags = ["-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC"]
    try:
        tools.run(["gcc", *flags, "-o", str(fresh), str(HERE / "wnodes_vm.c")], timeout_s=120)
    except CommandError as error:
        raise HostError(f"{library}: not built: {error.message}", hint="apt install gcc libslurm-dev") from error
    os.replace(fresh, library)
    tools.write_atomic(library.with_suffix(".slurm"), slurm_version(site).encode())


def built(site: Site) -> bool:
    """Whether the plug-in is there, built for the Slurm that is installed now, from the source we ship."""
    try:
        stamp = site.library.with_suffix(".slurm").read_text()
        source = (HERE / "wnodes_vm.c").stat().st_mtime
        return stamp == slurm_version(site) and site.library.stat().st_mtime >= source
    except OSError:
        return False


def slurm_version(site: Site) -> str:
    """``22.05.8``: each release of Slurm takes plug-ins built for it only. Raises HostError."""
    try:
        environ = {**tools.clean_environment(), "SLURM_CONF": str(site.slurm_conf)}  # even --version wants one
        return tools.run(["scontrol", "--version"], environ=environ).text.split()[-1]
    except CommandError as error:
        raise HostError(f"no Slurm on this host: {error.message}", hint="apt install slurm-client") from error
