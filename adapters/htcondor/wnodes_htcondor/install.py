"""What ``wnodes htcondor install`` puts where, made from what the site's HTCondor says of itself.

Contract read: condor_config_val(1), "Configuration Macros" of the HTCondor manual, 23.9 and 25.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wnodes_core import tools
from wnodes_core.errors import CommandError, SettingsError
from wnodes_htcondor import condorconf

HERE = Path(__file__).parent
EXECUTE_SCRIPTS = ("runtime", "advertise", "enter")
EXECUTE_CONF, SUBMIT_CONF = "60-wnodes-execute.conf", "60-wnodes-submit.conf"
_SAFE = re.compile(r"/[A-Za-z0-9._/+@-]*\Z")
# Before this release any starter hook drops the job's cgroup, and a lone job-exit hook can kill every
# process of the machine (HTCONDOR-3029, HTCONDOR-2871).
HOOKS_SAFE_FROM = (24, 8, 1)
_HOOK = re.compile(r"(?:[A-Z0-9]+_)?HOOK_(?:PREPARE_JOB(?:_BEFORE_TRANSFER)?|UPDATE_JOB_INFO|JOB_EXIT)", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One host's HTCondor and where our files shall be. Paths go into scripts: plain characters only."""

    config: Mapping[str, str]  # what condor_config_val says
    version: tuple[int, ...]
    prefix: Path = Path("/usr/lib/wnodes/htcondor")
    run_dir: Path = Path("/run/wnodes")
    python: str = sys.executable
    roles: tuple[str, ...] = ("execute", "submit")
    vms: int = field(default_factory=lambda: os.cpu_count() or 1)
    period_s: int = 30

    def __post_init__(self) -> None:
        paths = {name: str(getattr(self, name)) for name in ("prefix", "run_dir", "python")}
        for name, text in {**paths, "LOCAL_CONFIG_DIR": str(self.config_dir)}.items():
            if not _SAFE.match(text):
                raise SettingsError(f"{name} {text!r}: want an absolute path of letters, digits and . _ / + @ -")

    @property
    def config_dir(self) -> Path:
        """The first folder of configuration files, where ours go."""
        return Path(re.split(r"[,\s]+", self.config.get("LOCAL_CONFIG_DIR", "").strip())[0])

    @property
    def apptainer(self) -> str:
        """The site's own container runtime behind ours, or ''."""
        own = self.config.get("WNODES_SITE_SINGULARITY") or self.config.get("SINGULARITY", "")
        return own if own != str(self.prefix / "runtime") and os.access(own, os.X_OK) else ""


@dataclass(frozen=True)
class Step:
    """One file that shall be so; ``why`` is what a missing one costs."""

    path: Path
    text: str
    why: str
    mode: int = 0o644

    @property
    def done(self) -> bool:
        """Whether it is so already."""
        try:
            return self.path.read_text() == self.text and self.path.stat().st_mode & 0o777 == self.mode
        except OSError:
            return False

    def apply(self) -> None:
        """Make it so. Raises HostError, OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tools.write_atomic(self.path, self.text.encode(), mode=self.mode)


def ask(environ: Mapping[str, str] | None = None) -> tuple[dict[str, str], tuple[int, ...]]:
    """The host's configuration and version, from HTCondor's own commands. Raises SettingsError."""
    environ = dict(environ or tools.clean_environment(("CONDOR_CONFIG",)))
    try:
        dump = tools.run(["condor_config_val", "-dump", "-expand"], environ=environ).text
        version = tools.run(["condor_version"], environ=environ).text
    except CommandError as error:
        hint = "install HTCondor first, or name its configuration in CONDOR_CONFIG"
        raise SettingsError(f"HTCondor does not answer: {error.message}", hint=hint) from error
    return parse_dump(dump), parse_version(version)


def parse_dump(text: str) -> dict[str, str]:
    """``NAME = value`` lines of condor_config_val -dump; names in capitals.

    >>> parse_dump("# at: x\\nSingularity = /usr/bin/apptainer\\n")
    {'SINGULARITY': '/usr/bin/apptainer'}
    """
    pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name.strip().upper(): value.strip() for name, equals, value in pairs if equals}


def parse_version(text: str) -> tuple[int, ...]:
    """The release in condor_version's first line. Raises SettingsError.

    >>> parse_version("$CondorVersion: 23.9.6 2026-07-12 PackageID: 23.9.6 $")
    (23, 9, 6)
    """
    match = re.search(r"CondorVersion: (\d+)\.(\d+)\.(\d+)", text)
    if not match:
        raise SettingsError(f"condor_version said {text[:80]!r}: want $CondorVersion: A.B.C")
    return tuple(map(int, match.groups()))


def plan(site: Site) -> list[Step]:
    """Every file, done or not; the configuration last, when what it names is there."""
    steps: list[Step] = []
    if "execute" in site.roles:
        steps += [_script(site, name) for name in EXECUTE_SCRIPTS if (HERE / "hooks" / name).exists()]
        steps.append(_sshd_template(site))
        text = _filled(site, condorconf.EXECUTE + ("" if site.apptainer else condorconf.NO_APPTAINER))
        steps.append(Step(site.config_dir / EXECUTE_CONF, text, "without it no job lands in a VM"))
    if "submit" in site.roles:
        text = _filled(site, condorconf.SUBMIT)
        steps.append(Step(site.config_dir / SUBMIT_CONF, text, "without it condor_submit knows no vm_image"))
    return steps


def remove(site: Site) -> list[Path]:
    """Remove what ``plan`` names, configuration first; what is not there is fine. Returns what was removed."""
    removed = []
    for step in reversed(plan(site)):
        with suppress(FileNotFoundError):
            step.path.unlink()
            removed.append(step.path)
    with suppress(OSError):
        site.prefix.rmdir()
    return removed


def _script(site: Site, name: str) -> Step:
    return Step(site.prefix / name, _filled(site, (HERE / "hooks" / name).read_text()), f"hook {name}", 0o755)


def _sshd_template(site: Site) -> Step:
    """The site's own template for condor_ssh_to_job's sshd, with our command in front of every session."""
    own = Path(site.config.get("LIB", "/usr/lib/condor"), "condor_ssh_to_job_sshd_config_template")
    try:
        text = own.read_text()
    except OSError as error:
        raise SettingsError(f"{own}: {error.strerror}: want HTCondor's template") from error
    line = f"ForceCommand {site.prefix / 'enter'} _INSERT_FORCE_COMMAND_\n"
    return Step(site.prefix / "sshd_config", line + text, "condor_ssh_to_job would land on the host")


def _filled(site: Site, text: str) -> str:
    marks = {
        "PYTHON": site.python,
        "RUN": str(site.run_dir),
        "PREFIX": str(site.prefix),
        "CHIRP": f"{site.config.get('LIBEXEC', '/usr/libexec/condor')}/condor_chirp",
        "APPTAINER": site.apptainer,
        "VMS": str(site.vms),
        "PERIOD": f"{site.period_s}s",
        "IMAGE_PATTERN": condorconf.IMAGE_PATTERN,
        "VM_PATTERN": condorconf.VM_PATTERN.replace("\\", "\\\\"),  # as a ClassAd string
    }
    for mark, value in marks.items():
        text = text.replace(f"@{mark}@", value)
    return text


def overridden(site: Site) -> list[str]:
    """Settings of ours that a later file of the site's has changed: jobs that asked for a VM would run on the host."""
    if "execute" not in site.roles or not (site.config_dir / EXECUTE_CONF).exists():
        return []
    wanted = {
        "SINGULARITY": str(site.prefix / "runtime"),
        "SINGULARITY_JOB": "VM_Image",
        "SINGULARITY_IMAGE_EXPR": "wnodes:",
    }
    found = {name: site.config.get(name, "") for name in wanted}
    return [
        f"{name} = {value}: a later file than {EXECUTE_CONF} says so, and VM jobs would run on the host: want ours last"
        for name, value in found.items()
        if value and wanted[name] not in value
    ]


def warnings(site: Site) -> list[str]:
    """What a site has that harms its jobs."""
    if site.version >= HOOKS_SAFE_FROM:
        return []
    hooks = sorted(name for name, value in site.config.items() if _HOOK.fullmatch(name) and value)
    release = ".".join(map(str, site.version))
    return [
        f"{name} = {site.config[name]}: on HTCondor {release} a starter hook takes the job out of its cgroup, and"
        " a job-exit hook can kill every process of the machine: want none before 24.8.1"
        for name in hooks
    ]
