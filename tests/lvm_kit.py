"""A node with a volume group for tests: ``fake_lvm.py`` as its programs, loop devices as its volumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("lvs", "lvcreate", "lvremove", "blkdiscard")
POOL = {"mib": 100, "tags": [], "kind": "thin-pool", "zero": True, "when_full": "error", "data": "0.00", "metadata": "1.50"}


class FakeLvm:
    """The programs in ``folder``, and what they remember."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "fake_lvm.py"
        shutil.copy(Path(__file__).with_name("fake_lvm.py"), program)
        program.chmod(0o755)
        for name in PROGRAMS:
            os.symlink(program, folder / name)
        lvs = {"root": {"mib": 50, "tags": [], "kind": "linear"}, "pool": POOL}
        self.write({"groups": {"vg0": {"free": 100, "lvs": lvs}}, "faults": {}})

    def read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def write(self, state: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps(state))

    def fault(self, **faults: str) -> None:
        self.write({**self.read(), "faults": faults})

    def pool(self, **changes: Any) -> None:
        state = self.read()
        state["groups"]["vg0"]["lvs"]["pool"].update(changes)
        self.write(state)

    def stranger(self, name: str, *tags: str) -> None:
        """A volume that is not ours."""
        state = self.read()
        state["groups"]["vg0"]["lvs"][name] = {"mib": 4, "tags": list(tags), "kind": "linear"}
        self.write(state)

    def names(self) -> set[str]:
        return set(self.read()["groups"]["vg0"]["lvs"])

    def ours(self) -> set[str]:
        return {name for name in self.names() if name.startswith("wnodes-")}

    def free(self) -> int:
        return int(self.read()["groups"]["vg0"]["free"])

    def device(self, name: str) -> str:
        return str(self.read()["groups"]["vg0"]["lvs"][name]["loop"])

    def transcript(self) -> list[str]:
        file = self.folder / "transcript"
        return file.read_text().splitlines() if file.exists() else []

    def close(self) -> None:
        """Let go of the loop devices, by the files that are behind them: only ours."""
        for image in self.folder.glob("*.img"):
            found = subprocess.run(["losetup", "-j", image, "-O", "NAME", "-n"], capture_output=True, text=True).stdout
            for loop in found.split():
                subprocess.run(["losetup", "--detach", loop], check=False)
            image.unlink()


@contextmanager
def fake_lvm(folder: Path) -> Iterator[FakeLvm]:
    made = FakeLvm(folder)
    try:
        yield made
    finally:
        made.close()

