"""HTCondor out of Debian packages, under a folder of its own: for labs on hosts that have none.

``condor`` and just the shared libraries it needs are taken from the Debian mirror that this machine's
apt uses, unpacked below one prefix, and every ELF file is pointed at the prefix's own loader and
libraries (patchelf). Nothing is installed into the system; apt's signed index vouches for the packages,
and apt works in private folders.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wnodes_core import tools
from wnodes_core.errors import CommandError, HostError

SUITES = {"23": "trixie", "25": "forky"}  # HTCondor 23.9.6 and 25.x
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Of all that apt would install: condor itself and shared libraries, no interpreter and no system service.
_WANTED = re.compile(r"condor.*|zlib1g|lib.*")
_UNWANTED = re.compile(
    r"condor-upgrade-checks|lib(perl|python|js-|pam|semanage|debconf|ncurses|readline|gdbm|db5|date-manip).*"
)
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale")


def prefix(release: str, cache: Path | None = None) -> Path:
    """Where HTCondor ``release`` (``23`` or ``25``) lies unpacked; fetched now if it is not there yet.

    Raises HostError.
    """
    if release not in SUITES:
        raise HostError(f"HTCondor release {release!r}: want one of {', '.join(SUITES)}")
    cache = cache or Path(os.environ.get("WNODES_WORK", "/var/lib/wnodes-work")) / "htcondor"
    folder = cache / release
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{release}.lock"):
        if not (folder / "usr/sbin/condor_master").exists():
            _fetch(SUITES[release], folder)
    return folder


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fetch(suite: str, folder: Path) -> None:
    if not shutil.which("patchelf"):
        raise HostError("patchelf is not installed", hint="apt install patchelf")
    work = Path(tempfile.mkdtemp(prefix="wnodes-debs-"))
    try:
        debs = _download(suite, work)
        fresh = folder.with_name(f"{folder.name}.new")
        tools.remove_tree(fresh)
        fresh.mkdir(parents=True)
        for deb in debs:
            tools.run(["dpkg-deb", "-x", str(deb), str(fresh)], timeout_s=60)
        for name in _LEFT_OUT:
            tools.remove_tree(fresh / name)
        tools.remove_tree(folder)
        os.rename(fresh, folder)  # before patching: the paths that are patched in are the final ones
        _patch(folder)
    except CommandError as error:
        tools.remove_tree(folder)  # half a tree must not be taken for a whole one
        raise HostError(f"HTCondor of Debian {suite}: {error.message}") from error
    finally:
        tools.remove_tree(work)


def _download(suite: str, work: Path) -> list[Path]:
    """The packages of the closure that we want. Raises CommandError, HostError."""
    apt = _apt(suite, work)
    tools.run([*apt("apt-get"), "update"], timeout_s=120)
    closure = tools.run([*apt("apt-get"), "install", "--print-uris", "condor"], timeout_s=60).text
    # 'http://…/condor_23.9.6+dfsg_amd64.deb' condor_23.9.6+dfsg_amd64.deb 123 SHA256:…
    names = [line.split()[1].partition("_")[0] for line in closure.splitlines() if line.startswith("'")]
    wanted = [name for name in names if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name)]
    folder = work / "debs"
    tools.run([*apt("apt-get"), "download", *wanted], cwd=str(folder), timeout_s=300)
    return sorted(folder.glob("*.deb"))


def _apt(suite: str, work: Path) -> Callable[[str], list[str]]:
    """apt with every folder of its own, and an empty dpkg database: it then names the whole closure."""
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {suite} main\n")
    options = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::State": work,
        "Dir::State::status": work / "status",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return lambda program: [program, "-qq", *words]


def _mirror() -> str:
    """The Debian archive that this machine's apt uses, not the security one. Raises HostError."""
    listed = tools.run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).text
    found = [line for line in listed.splitlines() if "security" not in line.lower()]
    if not found:
        raise HostError("no Debian mirror in apt's configuration", hint="see /etc/apt/sources.list")
    return found[0]


def _patch(folder: Path) -> None:
    """Point every program and library at the prefix's own loader and libraries."""
    multi = next((folder / "usr/lib").glob("*-linux-gnu*/libc.so.6")).parent
    tools.run(["ldconfig", "-n", str(folder / "usr/lib"), str(multi)])
    loader = next(path for path in sorted(folder.glob("usr/lib*/ld-linux-*.so.*")))
    rpath = f"{multi}:{folder}/usr/lib:{folder}/usr/lib/condor"
    places = [folder / "usr" / name for name in ("bin", "sbin", "libexec")]
    files = [path for place in places for path in place.rglob("*")] + list((folder / "usr/lib").glob("*.so*"))
    for path in files:
        if path.is_file() and not path.is_symlink() and _is_elf(path):
            _patch_one(path, loader, rpath)


def _patch_one(path: Path, loader: Path, rpath: str) -> None:
    dynamic = tools.run(["patchelf", "--print-interpreter", str(path)], check=False).exit_code == 0
    words: Sequence[str] = ("--set-interpreter", str(loader)) if dynamic else ()
    # check=False: a static program has neither, and needs neither.
    tools.run(["patchelf", *words, "--force-rpath", "--set-rpath", rpath, str(path)], check=dynamic)


def _is_elf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"
