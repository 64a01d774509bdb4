"""A throw-away virtual environment that sees the installed wnodes, for plug-ins from outside the tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

SCRIPT = "#!{python} -I\nimport sys\nfrom {module} import main\nsys.exit(main())\n"


class Venv:
    """Made in a quarter of a second: no pip of its own, everything of ours by a path file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "wnodes.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        for name, module in (("wnodes", "wnodes_core.cli"), ("wnodesd", "wnodes_core.agent.server")):
            (folder / "bin" / name).write_text(SCRIPT.format(python=self.python, module=module))
            (folder / "bin" / name).chmod(0o755)

    def environ(self, **more: str) -> dict[str, str]:
        """A shell's environment with this venv first on the path."""
        clean = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
        return {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", **more}

    def run(self, *argv: object, check: bool = True, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this venv."""
        words = [str(word) for word in argv]
        done = subprocess.run(words, env=self.environ(**more), cwd=cwd or self.folder, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def install(self, *packages: Path) -> None:
        """As an admin would, without a network."""
        how = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        self.run(self.python, "-m", "pip", "install", *how, *packages)

    def uninstall(self, *names: str) -> None:
        self.run(self.python, "-m", "pip", "uninstall", "--quiet", "--yes", *names)

    def test(self, folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run pytest in this venv."""
        argv = [self.python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *words, folder]
        return self.run(*argv, check=check)

    def plugins(self) -> dict[str, dict[str, Any]]:
        """What ``wnodes plugins`` lists, by name."""
        done = self.run(self.folder / "bin" / "wnodes", "plugins", "--json", check=False)
        return {one["name"]: one for one in json.loads(done.stdout)}
