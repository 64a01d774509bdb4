"""A node with a volume group for tests: ``fake_lvm.py`` as its programs, loop devices as its volumes."""

from __future__ import annotations

import fcntl
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
        (folder / "state.json").write_text(json.dumps({"groups": {"vg0": {"free": 100, "lvs": lvs}}, "faults": {}}))

    def read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """Its memory, to be changed while no program has it."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.read()
            yield state
            (self.folder / "state.new").write_text(json.dumps(state))
            os.replace(self.folder / "state.new", self.folder / "state.json")

    def fault(self, **faults: str) -> None:
        with self.changed() as state:
            state["faults"] = faults

    def pool(self, **changes: Any) -> None:
        with self.changed() as state:
            state["groups"]["vg0"]["lvs"]["pool"].update(changes)

    def stranger(self, name: str, *tags: str) -> None:
        """A volume that is not ours."""
        with self.changed() as state:
            state["groups"]["vg0"]["lvs"][name] = {"mib": 4, "tags": list(tags), "kind": "linear"}

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
        shown = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True).stdout
        for loop, _, file in (line.partition(" ") for line in shown.splitlines()):
            if file.strip().startswith(f"{self.folder}/"):
                subprocess.run(["losetup", "--detach", loop], check=False)


@contextmanager
def fake_lvm(folder: Path) -> Iterator[FakeLvm]:
    made = FakeLvm(folder)
    try:
        yield made
    finally:
        made.close()

